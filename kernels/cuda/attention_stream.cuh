// How a block of the streaming attention kernel (attention.cu) gets its keys and values, and the
// step's own queries, key and value.
//
// A block's units make one stream of KV blocks, element 0, 1, …; element e belongs to warp e % 8.
// Every warp feeds itself, keys and values in turn, through a ring of its own in shared memory:
// what it has read makes room for what it asks for next, of later units too. Units and tables,
// which a step's first kernel finds in place, are read past the L1 as all that changes from step to
// step is.
#pragma once

#include <type_traits>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/attention_layout.h"
#include "kernels/cuda/attention_ptx.cuh"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT::stream {

constexpr int32_t kWarps = 8;
constexpr int32_t kThreads = kWarps * 32;
constexpr int32_t kMergers = kWarps / 2;
constexpr int32_t kPageItems = 32;  // of a block that it knows at a time
// Two blocks fill a multiprocessor's shared memory, this kernel's and a neighbour's in the step.
constexpr int32_t kSharedBytes = kDecodeSharedBytes;
constexpr int32_t kAloneBytes = 116 * 1024;  // more than half of a multiprocessor's
constexpr float kNever = -1e30f;  // below every score; finite, so that differences stay numbers

// A unit for one KV head.
struct Item {
  int32_t first_row, first_position;
  int32_t tokens;
  int32_t kv_head;
  int32_t parts, part, place;
  int32_t begin, count;  // KV blocks
  int32_t table;         // of the sequence, in the block tables
  int32_t last_block;    // KV block of the last token; not with kFixed

  [[nodiscard]] __device__ __forceinline__ int32_t Last() const {
    return first_position + tokens - 1;
  }
  // The KV block of the last token is among these.
  [[nodiscard]] __device__ __forceinline__ bool HasNewest() const {
    return begin + count == Last() / kKvBlockTokens + 1;
  }
};

// What a kernel instance is compiled for: heads of kDT elements, at most kRowsT rows a unit;
// kFixedT: results are left in fixed point.
template <int32_t kDT, int32_t kRowsT, bool kFixedT = false>
struct Shape {
  static constexpr bool kFixed = kFixedT;
  static constexpr int32_t kD = kDT;
  static constexpr int32_t kRows = kRowsT;
  static constexpr int32_t kRowTiles = (kRows + 7) / 8;
  // Keys or values of a KV block and head.
  static constexpr int32_t kPieceHalves = kKvBlockTokens * kD;
  static constexpr int32_t kPieceBytes = kPieceHalves * 2;
  static constexpr int32_t kRowBytes = KvRowBytes(kD);
  static constexpr int32_t kPanelBytes = 8 * kRowBytes;

  static constexpr int32_t kQueryStride = kD + 8;  // halves: ldmatrix without bank conflicts
  // Warps meet over some columns at a time, so that the memory they meet in stays small.
  static constexpr int32_t kPasses = kRows * kD > 512 ? kRows* kD / 512 : 1;
  static constexpr int32_t kColumns = kD / kPasses;
  static constexpr int32_t kPartStride = kColumns + 4;  // floats

  static constexpr int32_t kSlotsMax = 8;
  static constexpr int32_t kQueries = 0;  // offsets behind the rings
  static constexpr int32_t kNewest = kQueries + kRowTiles * 8 * kQueryStride * 2;
  static constexpr int32_t kParts = kNewest + 2 * kD * 2;
  static constexpr int32_t kStates = kParts + kMergers * kRows * kPartStride * 4;
  static constexpr int32_t kItems = kStates + kMergers * kRows * 8;
  static constexpr int32_t kBars =
      (kItems + kPageItems * static_cast<int32_t>(sizeof(Item)) + 7) / 8 * 8;
  static constexpr int32_t kRoom = (kSharedBytes - kBars) / (kWarps * (kPieceBytes + 8));
  static constexpr int32_t kSlots = kRoom < kSlotsMax ? kRoom : kSlotsMax;  // of a warp's ring
  static constexpr int32_t kRingBytes = kSlots * kPieceBytes;
  static_assert(kSlots >= 2);
};

template <typename S>
struct Shared {
  uint8_t* rings;
  Real16* queries;  // [rows, to a multiple of 8][kQueryStride]
  Real16* newest;   // the step's own key, then value
  float* parts;     // [kMergers][kRows][kPartStride]
  float2* states;   // [kMergers][kRows]: maximum and sum
  Item* items;      // of the page
  uint64_t* full;   // [kWarps][kSlots]

  __device__ __forceinline__ explicit Shared(uint8_t* memory) {
    rings = memory;
    uint8_t* rest = memory + kWarps * S::kRingBytes;
    queries = reinterpret_cast<Real16*>(rest + S::kQueries);
    newest = reinterpret_cast<Real16*>(rest + S::kNewest);
    parts = reinterpret_cast<float*>(rest + S::kParts);
    states = reinterpret_cast<float2*>(rest + S::kStates);
    items = reinterpret_cast<Item*>(rest + S::kItems);
    full = reinterpret_cast<uint64_t*>(rest + S::kBars);
  }
};

// The block's items of a page, one a lane; returns how many there are. Every warp.
template <typename S>
__device__ __forceinline__ int32_t LoadPage(const AttentionParams& p, int32_t page, Item* items) {
  const int32_t lane = threadIdx.x % 32;
  const auto stride = static_cast<int32_t>(gridDim.x);
  const int32_t index = static_cast<int32_t>(blockIdx.x) + (page * kPageItems + lane) * stride;
  const int32_t unit = index / p.kv_heads;
  int4 a = {}, b = {};
  if (unit < p.unit_count) {
    a = __ldcg(reinterpret_cast<const int4*>(p.units + unit));
    b = __ldcg(reinterpret_cast<const int4*>(p.units + unit) + 1);
  }
  const int32_t tokens = a.w & 0xffff;
  if (tokens > 0 && threadIdx.x < 32) {
    Item item;
    item.first_row = a.x;
    item.first_position = a.y;
    item.tokens = tokens;
    item.kv_head = index - unit * p.kv_heads;
    item.parts = a.w >> 16;
    item.part = b.w;
    item.place = b.z;
    const int32_t first_seen = p.window > 0 ? max(0, item.first_position - p.window + 1) : 0;
    item.begin = max(b.x, first_seen / kKvBlockTokens);
    item.count = max(0, min(b.y, item.Last() / kKvBlockTokens + 1) - item.begin);
    item.table = a.z * p.table_size;
    if constexpr (!S::kFixed) {
      item.last_block = __ldcg(p.block_tables + item.table + item.Last() / kKvBlockTokens);
    }
    items[lane] = item;
  }
  return __popc(__ballot_sync(0xffffffffu, tokens > 0));
}

// Where a warp stands in its ring.
template <typename S>
struct Ring {
  uint8_t* slots;
  uint64_t* full;
  int32_t slot = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ Ring(const Shared<S>& shared, int32_t warp)
      : slots(shared.rings + warp * S::kRingBytes), full(shared.full + warp * S::kSlots) {}
  [[nodiscard]] __device__ __forceinline__ uint8_t* Wait() const {
    BarrierWait(full + slot, phase);
    return slots + slot * S::kPieceBytes;
  }
  __device__ __forceinline__ void Advance() {
    if (++slot == S::kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// Asks for a warp's elements of a page, keys and values in turn.
template <typename S>
struct Feeder {
  const Item* items;
  int32_t count;    // items of the page
  int32_t element;  // the next one
  int32_t item = 0;
  int32_t first = 0;  // element with which the item begins
  int32_t block = 0;  // KV block of the element
  bool values = false;
  uint64_t policy;

  // Finds the element: its KV block is on its way from memory when this returns.
  __device__ __forceinline__ void Seek(const AttentionParams& p) {
    while (item < count && element >= first + items[item].count) first += items[item++].count;
    if (item == count) return;
    block = __ldcg(p.block_tables + items[item].table + items[item].begin + element - first);
  }
  // `written`: the slot has been written by ordinary stores since it was filled.
  __device__ __forceinline__ void Issue(const AttentionParams& p, const Ring<S>& ring, int32_t slot,
                                        bool written, int32_t lane) {
    if (item == count) return;
    if (written) FenceSharedForCopies();
    __syncwarp();
    if (lane == 0) {
      const int64_t at =
          (static_cast<int64_t>(block) * p.kv_heads + items[item].kv_head) * S::kPieceHalves;
      BarrierExpect(ring.full + slot, S::kPieceBytes);
      BulkCopy(ring.slots + slot * S::kPieceBytes, (values ? p.cache.values : p.cache.keys) + at,
               S::kPieceBytes, ring.full + slot, policy);
    }
    if (values) {
      element += kWarps;
      Seek(p);
    }
    values = !values;
  }
};

// A lane's elements of a head: kPer of the first half, and those of the second half that they are
// rotated with.
template <int32_t kD>
struct HeadPart {
  static constexpr int32_t kPer = kD >= 64 ? kD / 64 : 1;
  using Raw = std::conditional_t<kPer == 2, Real16x2, Real16>;
  float low[kPer], high[kPer];

  [[nodiscard]] static __device__ __forceinline__ bool Active(int32_t lane) {
    return lane * kPer < kD / 2;
  }
  static __device__ __forceinline__ void Widen(Real16x2 raw, float (&values)[kPer]) {
    const float2 two = ToFloats(raw);
    values[0] = two.x;
    values[kPer - 1] = two.y;
  }
  static __device__ __forceinline__ void Widen(Real16 raw, float (&values)[kPer]) {
    values[0] = ToFloat(raw);
  }
  static __device__ __forceinline__ void Write(const float (&values)[kPer], Real16* to) {
    if constexpr (kPer == 2) {
      *reinterpret_cast<Real16x2*>(to) = ToReals(values[0], values[1]);
    } else {
      *to = ToReal(values[0]);
    }
  }
  __device__ __forceinline__ void Store(Real16* head, int32_t lane) const {
    if (!Active(lane)) return;
    Write(low, head + lane * kPer);
    Write(high, head + kD / 2 + lane * kPer);
  }
  // Into the cache: `piece` is the KV block's.
  __device__ __forceinline__ void StoreSwizzled(Real16* piece, int32_t place, int32_t lane) const {
    if (!Active(lane)) return;
    Write(low, piece + KvOffset(place, lane * kPer, kD));
    Write(high, piece + KvOffset(place, kD / 2 + lane * kPer, kD));
  }
};

// The same as it lies in memory.
template <int32_t kD>
struct RawPart {
  using Part = HeadPart<kD>;
  typename Part::Raw low, high;

  __device__ __forceinline__ void Load(const Real16* head, int32_t lane) {
    if (!Part::Active(lane)) return;
    low = LoadInOrder(reinterpret_cast<const typename Part::Raw*>(head + lane * Part::kPer));
    high =
        LoadInOrder(reinterpret_cast<const typename Part::Raw*>(head + kD / 2 + lane * Part::kPer));
  }
  // The sum of the head's parts, several asked for at a time, rounded as the whole would be.
  __device__ __forceinline__ void LoadSum(const AttentionRotation& rotation, const float* head,
                                          int32_t lane) {
    using Floats = std::conditional_t<Part::kPer == 2, float2, float>;
    if (!Part::Active(lane)) return;
    float sums[2][Part::kPer] = {};
    for (int32_t first = 0; first < rotation.part_count; first += 4) {
      Floats parts[4][2] = {};
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        if (first + i >= rotation.part_count) continue;
        const float* from = head + (first + i) * rotation.part_stride + lane * Part::kPer;
        parts[i][0] = LoadInOrder(reinterpret_cast<const Floats*>(from));
        parts[i][1] = LoadInOrder(reinterpret_cast<const Floats*>(from + kD / 2));
      }
#pragma unroll
      for (const auto& part : parts) {
#pragma unroll
        for (int32_t i = 0; i < 2 * Part::kPer; ++i) {
          sums[i / Part::kPer][i % Part::kPer] +=
              reinterpret_cast<const float*>(&part[i / Part::kPer])[i % Part::kPer];
        }
      }
    }
    Part::Write(sums[0], reinterpret_cast<Real16*>(&low));
    Part::Write(sums[1], reinterpret_cast<Real16*>(&high));
  }
  [[nodiscard]] __device__ __forceinline__ HeadPart<kD> Widened(int32_t lane) const {
    HeadPart<kD> part = {};
    if (!Part::Active(lane)) return part;
    Part::Widen(low, part.low);
    Part::Widen(high, part.high);
    return part;
  }
};

template <int32_t kD>
__device__ __forceinline__ void Norm(const Real16* weight, float epsilon, int32_t lane,
                                     HeadPart<kD>* x) {
  RawPart<kD> raw;
  raw.Load(weight, lane);
  float squares = 0;
#pragma unroll
  for (int32_t i = 0; i < x->kPer; ++i) squares += x->low[i] * x->low[i] + x->high[i] * x->high[i];
  squares = SumOfWarp(squares);
  const HeadPart<kD> factor = raw.Widened(lane);
  const float inverse = rsqrtf(squares / static_cast<float>(kD) + epsilon);
#pragma unroll
  for (int32_t i = 0; i < x->kPer; ++i) {
    x->low[i] *= inverse * factor.low[i];
    x->high[i] *= inverse * factor.high[i];
  }
}

// Cosines and sines of a position for a lane's elements.
template <int32_t kD>
struct Angles {
  static constexpr int32_t kPer = HeadPart<kD>::kPer;
  float cos[kPer], sin[kPer];

  __device__ __forceinline__ void Load(const AttentionRotation& rotation, int32_t position,
                                       int32_t lane) {
    if (!HeadPart<kD>::Active(lane)) return;
    const int64_t at = static_cast<int64_t>(position) * (kD / 2) + lane * kPer;
#pragma unroll
    for (int32_t i = 0; i < kPer; ++i) {
      cos[i] = rotation.cos[at + i];
      sin[i] = rotation.sin[at + i];
    }
  }
  __device__ __forceinline__ void Rotate(HeadPart<kD>* x) const {
#pragma unroll
    for (int32_t i = 0; i < kPer; ++i) {
      const float low = x->low[i], high = x->high[i];
      x->low[i] = low * cos[i] - high * sin[i];
      x->high[i] = high * cos[i] + low * sin[i];
    }
  }
};

// The queries of an item's one token, and its key and value where the item has their KV block: a
// warp sees to whole heads. Addresses are reckoned ahead, heads loaded as soon as they are there,
// rotated and stored when their turn has come.
template <typename S>
struct Token {
  static constexpr int32_t kD = S::kD;
  static constexpr int32_t kHeads = (S::kRows + 2 + kWarps - 1) / kWarps;  // of a warp
  const Real16* from[kHeads];                                              // nullptr: no such head
  Real16* to;  // the KV block of the key or value in the cache
  RawPart<kD> heads[kHeads];
  Angles<kD> angles;

  __device__ __forceinline__ void Aim(const AttentionParams& p, const Item& item, int32_t rows,
                                      int32_t warp, int32_t lane) {
    angles.Load(p.rotation, item.Last(), lane);
    const Real16* row = p.q + item.first_row * p.q_stride;
    const int32_t count = item.HasNewest() ? rows + 2 : rows;
    to = nullptr;
#pragma unroll
    for (int32_t i = 0; i < kHeads; ++i) {
      const int32_t task = warp + i * kWarps;
      int32_t head = item.kv_head * rows + task;
      if (task >= rows) head = p.heads + item.kv_head + (task - rows) * p.kv_heads;
      from[i] = task < count ? row + head * kD : nullptr;
      if (task < rows || task >= count) continue;
      // Where a block has hardly more than one item, its first KV blocks shall not wait for this.
      const int32_t block = S::kFixed
                                ? __ldcg(p.block_tables + item.table + item.Last() / kKvBlockTokens)
                                : item.last_block;
      to = (task == rows ? p.cache.keys : p.cache.values) +
           (static_cast<int64_t>(block) * p.kv_heads + item.kv_head) * S::kPieceHalves;
    }
  }
  __device__ __forceinline__ void Load(const AttentionParams& p, int32_t lane) {
#pragma unroll
    for (int32_t i = 0; i < kHeads; ++i) {
      if (from[i] == nullptr) continue;
      if (p.rotation.parts == nullptr) {
        heads[i].Load(from[i], lane);
      } else {
        heads[i].LoadSum(p.rotation, p.rotation.parts + (from[i] - p.q), lane);
      }
    }
  }
  __device__ __forceinline__ void Take(const AttentionParams& p, int32_t rows,
                                       const Shared<S>& shared, int32_t place, int32_t warp,
                                       int32_t lane) const {
#pragma unroll
    for (int32_t i = 0; i < kHeads; ++i) {
      if (from[i] == nullptr) continue;
      const int32_t task = warp + i * kWarps;
      HeadPart<kD> head = heads[i].Widened(lane);
      if (task <= rows) {
        const Real16* norm = task == rows ? p.rotation.k_norm : p.rotation.q_norm;
        if (norm != nullptr) Norm<kD>(norm, p.rotation.epsilon, lane, &head);
        angles.Rotate(&head);
      }
      if (task < rows) {
        head.Store(shared.queries + task * S::kQueryStride, lane);
      } else {
        head.Store(shared.newest + (task - rows) * kD, lane);
        head.StoreSwizzled(to, place, lane);
      }
    }
  }
};

// Queries as they are, of several tokens perhaps.
template <typename S>
__device__ __forceinline__ void TakeQueries(const AttentionParams& p, const Item& item,
                                            const Shared<S>& shared) {
  constexpr int32_t kChunks = S::kD / 8;
  const int32_t group = p.heads / p.kv_heads;
  for (int32_t i = threadIdx.x; i < item.tokens * group * kChunks; i += kThreads) {
    const int32_t row = i / kChunks, chunk = i % kChunks;
    const int32_t head = item.kv_head * group + row % group;
    const Real16* from =
        p.q + (item.first_row + row / group) * p.q_stride + head * S::kD + chunk * 8;
    *reinterpret_cast<uint4*>(shared.queries + row * S::kQueryStride + chunk * 8) =
        LoadInOrder(reinterpret_cast<const uint4*>(from));
  }
}

// The KV block of the item's last token as it came: puts the step's own key or value in its row.
template <typename S>
__device__ __forceinline__ void PutNewest(const Item& item, const Real16* newest, uint8_t* piece,
                                          int32_t lane) {
  if (lane < S::kD / 8) {
    Real16* to =
        reinterpret_cast<Real16*>(piece) + KvOffset(item.Last() % kKvBlockTokens, lane * 8, S::kD);
    *reinterpret_cast<uint4*>(to) = reinterpret_cast<const uint4*>(newest)[lane];
  }
  __syncwarp();
}

// Zeroes values behind the end, where an earlier sequence may have left anything.
template <typename S>
__device__ __forceinline__ void ZeroBehind(const Item& item, uint8_t* values, int32_t lane) {
  constexpr int32_t kChunks = S::kD / 8;
  const int32_t first = item.Last() % kKvBlockTokens + 1;
  for (int32_t i = lane; i < (kKvBlockTokens - first) * kChunks; i += 32) {
    const int32_t at = KvOffset(first + i / kChunks, i % kChunks * 8, S::kD);
    *reinterpret_cast<uint4*>(reinterpret_cast<Real16*>(values) + at) = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT::stream
