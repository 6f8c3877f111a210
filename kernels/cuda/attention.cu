#include "kernels/cuda/attention.h"

#include "kernels/cuda/attention_prompt.cuh"
#include "kernels/cuda/attention_stream.cuh"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/w4_fixed.cuh"
#include "kernels/layout/gpu_x.h"

namespace nibble::cuda::NIBBLE_ELEMENT {
namespace {

using namespace stream;

// What a warp knows of an item's rows. Products are of keys with queries, and of values with
// weights: positions, then elements of a head, are the sixteen rows of the tensor cores' tiles, and
// the item's rows are their columns, eight a tile. Lane l has columns 2 (l % 4) and the next.
template <typename S>
struct RowState {
  static constexpr int32_t kD = S::kD;
  static constexpr int32_t kRowTiles = S::kRowTiles;
  float out[kD / 16][kRowTiles][4];
  float max[kRowTiles][2];
  float sum[kRowTiles][2];  // of this lane's positions
  int32_t position[kRowTiles][2];

  __device__ __forceinline__ void Begin(const Item& item, int32_t group, int32_t lane) {
#pragma unroll
    for (int32_t t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        const int32_t row = min(t * 8 + 2 * (lane % 4) + i, item.tokens * group - 1);
        position[t][i] = item.first_position + (item.tokens == 1 ? 0 : row / group);
        max[t][i] = kNever;
        sum[t][i] = 0;
      }
#pragma unroll
      for (int32_t step = 0; step < kD / 16; ++step) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) out[step][t][i] = 0;
      }
    }
  }
};

// Lane offsets into a piece for ldmatrix: the four 8x8 matrices are those of both groups of
// positions and of two neighbouring chunks of eight elements.
template <typename S>
struct Offsets {
  static constexpr int32_t kD = S::kD;
  uint32_t keys, values;

  __device__ __forceinline__ explicit Offsets(int32_t lane) {
    const int32_t matrix = lane / 8, row = lane % 8;
    keys = static_cast<uint32_t>(2 * KvOffset(matrix % 2 * 8 + row, matrix / 2 * 8, kD));
    values = static_cast<uint32_t>(2 * KvOffset(matrix / 2 * 8 + row, matrix % 2 * 8, kD));
  }
  // `offset` for chunks 2 * step and the next.
  static __device__ __forceinline__ uint32_t At(uint32_t offset, int32_t step) {
    const int32_t byte = step * 32;
    return (offset ^ static_cast<uint32_t>(byte % S::kRowBytes)) +
           static_cast<uint32_t>(byte / S::kRowBytes * S::kPanelBytes);
  }
};

// Scores of 16 positions with the item's rows. Two chains of products a row tile.
template <typename S>
__device__ __forceinline__ void Scores(uint32_t keys, uint32_t queries, int32_t lane,
                                       float (&s)[S::kRowTiles][4]) {
  constexpr int32_t kD = S::kD, kRowTiles = S::kRowTiles;
  constexpr int32_t kRowBytes = S::kQueryStride * 2;
  const uint32_t q_at = queries + lane % 8 * kRowBytes + lane / 8 * 16;
  float odd[kRowTiles][4] = {};
#pragma unroll
  for (int32_t t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) s[t][i] = 0;
  }
#pragma unroll
  for (int32_t step = 0; step < kD / 16; step += 2) {
    uint32_t a[4], b[kRowTiles][4];
#pragma unroll
    for (int32_t t = 0; t < kRowTiles; ++t) {
      LoadMatrices(q_at + t * 8 * kRowBytes + step * 32, b[t]);
    }
    LoadMatrices(Offsets<S>::At(keys, step), a);
#pragma unroll
    for (int32_t t = 0; t < kRowTiles; ++t) Mma(s[t], a, b[t][0], b[t][1]);
    if (kD == 16) break;
    LoadMatrices(Offsets<S>::At(keys, step + 1), a);
#pragma unroll
    for (int32_t t = 0; t < kRowTiles; ++t) Mma(odd[t], a, b[t][2], b[t][3]);
  }
#pragma unroll
  for (int32_t t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) s[t][i] += odd[t][i];
  }
}

// Hides positions that a row must not see, takes the scores into the running maxima and sums and
// leaves the weights as the next product's input.
template <typename S>
__device__ __forceinline__ void Softmax(const AttentionParams& p, int32_t first_key, int32_t lane,
                                        float (&s)[S::kRowTiles][4], RowState<S>* state,
                                        uint32_t (&weights)[S::kRowTiles][2]) {
  const float to_base_2 = p.scale * 1.4426950408889634f;
#pragma unroll
  for (int32_t t = 0; t < S::kRowTiles; ++t) {
    float keep[2];
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t position = state->position[t][i];
      float most = kNever;
#pragma unroll
      for (int32_t upper = 0; upper < 2; ++upper) {
        const int32_t key = first_key + lane / 4 + 8 * upper;
        float& score = s[t][2 * upper + i];
        const bool seen = key <= position && (p.window == 0 || key > position - p.window);
        score = seen ? score * to_base_2 : kNever;
        most = fmaxf(most, score);
      }
#pragma unroll
      for (int32_t offset = 4; offset < 32; offset *= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
      }
      const float max = fmaxf(state->max[t][i], most);
      keep[i] = Exp2(state->max[t][i] - max);
      state->max[t][i] = max;
      state->sum[t][i] *= keep[i];
#pragma unroll
      for (int32_t upper = 0; upper < 2; ++upper) {
        float& score = s[t][2 * upper + i];
        // NaN stays NaN: it must reach this sequence's logits.
        score = score <= kNever ? 0.0f : Exp2(score - max);
        state->sum[t][i] += score;
      }
    }
#pragma unroll
    for (int32_t upper = 0; upper < 2; ++upper) {
      weights[t][upper] = Transpose(RealBits(s[t][2 * upper], s[t][2 * upper + 1]));
    }
#pragma unroll
    for (int32_t step = 0; step < S::kD / 16; ++step) {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) state->out[step][t][i] *= keep[i % 2];
    }
  }
}

template <typename S>
__device__ __forceinline__ void AddValues(uint32_t values,
                                          const uint32_t (&weights)[S::kRowTiles][2],
                                          RowState<S>* state) {
#pragma unroll
  for (int32_t step = 0; step < S::kD / 16; ++step) {
    uint32_t a[4];
    LoadTransposed(Offsets<S>::At(values, step), a);
#pragma unroll
    for (int32_t t = 0; t < S::kRowTiles; ++t) {
      Mma(state->out[step][t], a, weights[t][0], weights[t][1]);
    }
  }
}

// Two elements of a row, of a maximum and a sum that belong to them.
struct Merged {
  float max = kNever;
  float sum = 0;
  float2 out = {0, 0};

  __device__ __forceinline__ void Add(float other_max, float other_sum, float2 other) {
    const float most = fmaxf(max, other_max);
    const float mine = Exp2(max - most), theirs = Exp2(other_max - most);
    max = most;
    sum = sum * mine + other_sum * theirs;
    out.x = out.x * mine + other.x * theirs;
    out.y = out.y * mine + other.y * theirs;
  }
};

template <typename S>
__device__ __forceinline__ void WriteOut(const AttentionParams& p, const Item& item, int32_t row,
                                         int32_t column, const Merged& merged) {
  const int32_t group = p.heads / p.kv_heads;
  const int64_t token = item.first_row + (item.tokens == 1 ? 0 : row / group);
  const int32_t head = item.kv_head * group + (item.tokens == 1 ? row : row % group);
  const float inverse = __fdividef(1.0f, merged.sum);
  Real16* to = p.out + p.fragments.Index(static_cast<int32_t>(token), head * S::kD + column,
                                         p.heads * S::kD);
  if (p.ordered != nullptr) {
    to = p.ordered + layout::GpuOrderedIndex(static_cast<int32_t>(token), head * S::kD + column,
                                             p.ordered_group, p.ordered_tokens);
  }
  *reinterpret_cast<Real16x2*>(to) = ToReals(merged.out.x * inverse, merged.out.y * inverse);
}

// Where one part of an item leaves its rows: two elements of a row with the row's maximum and sum
// in 16 bytes, whose words say by themselves that they have arrived: zero is "not yet", a value of
// zero is written as -0. Whoever reads it leaves it zero.
template <typename S>
__device__ __forceinline__ uint4* PlaceOfPart(const AttentionParams& p, const Item& item,
                                              int32_t part, int32_t pair) {
  const int64_t place = static_cast<int64_t>(item.place + part) * p.kv_heads + item.kv_head;
  return reinterpret_cast<uint4*>(p.scratch) + place * (kAttentionRows * S::kD / 2) + pair;
}

__device__ __forceinline__ uint32_t NotZero(float value) {
  return value == 0.0f ? 0x80000000u : __float_as_uint(value);
}

// `words`: what has been asked for there already.
__device__ __forceinline__ Merged TakePart(uint4* place, uint4 words) {
  while (words.x == 0 || words.y == 0 || words.z == 0 || words.w == 0) words = LoadRelaxed(place);
  __stcg(place, make_uint4(0, 0, 0, 0));
  Merged merged;
  merged.max = __uint_as_float(words.z);
  merged.sum = __uint_as_float(words.w);
  merged.out = make_float2(__uint_as_float(words.x), __uint_as_float(words.y));
  return merged;
}

// Every part's block finishes a share of the item's rows: a group of lanes takes one pair of
// elements, a lane one part or several, and they meet in a fixed order. Every thread of the block,
// after all its items have left their parts: blocks that wait for one another must not work in
// between.
template <typename S>
__device__ __forceinline__ void Collect(const AttentionParams& p, const Item& item) {
  const int32_t pairs = item.tokens * (p.heads / p.kv_heads) * (S::kD / 2);
  int32_t lanes = 32;
  while (lanes / 2 >= item.parts) lanes /= 2;
  const int32_t begin = pairs * item.part / item.parts;
  const int32_t end = pairs * (item.part + 1) / item.parts;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  for (int32_t first = begin; first < end; first += kThreads / lanes) {
    const int32_t pair = first + thread / lanes;
    Merged merged;
    for (int32_t part = thread % lanes; pair < end && part < item.parts; part += lanes) {
      uint4* place = PlaceOfPart<S>(p, item, part, pair);
      const Merged other = TakePart(place, LoadRelaxed(place));
      merged.Add(other.max, other.sum, other.out);
    }
    for (int32_t offset = 1; offset < lanes; offset *= 2) {
      const float max = __shfl_xor_sync(0xffffffffu, merged.max, offset);
      const float sum = __shfl_xor_sync(0xffffffffu, merged.sum, offset);
      const float x = __shfl_xor_sync(0xffffffffu, merged.out.x, offset);
      const float y = __shfl_xor_sync(0xffffffffu, merged.out.y, offset);
      merged.Add(max, sum, make_float2(x, y));
    }
    if (pair < end && thread % lanes == 0) {
      WriteOut<S>(p, item, pair / (S::kD / 2), pair % (S::kD / 2) * 2, merged);
    }
  }
}

// A warp's row in fixed point: a head of 128 elements is a slab of the next product's input, and a
// lane has four elements side by side.
template <typename S>
__device__ __forceinline__ void LeaveFixed(const AttentionParams& p, const Item& item, int32_t row,
                                           int32_t lane, const float (&v)[4]) {
  const int32_t head = item.kv_head * (p.heads / p.kv_heads) + row;
  StoreFixed(v, item.first_row, head * S::kD + lane * 4, p.ordered_tokens, p.ordered,
             p.ordered_scales);
}

// Collect for fixed point: whole rows.
template <typename S>
__device__ __forceinline__ void CollectFixed(const AttentionParams& p, const Item& item) {
  constexpr int32_t kTogether = 4;  // parts that are asked for at a time
  const int32_t rows = p.heads / p.kv_heads, lane = threadIdx.x % 32;
  const auto warp = static_cast<int32_t>(threadIdx.x) / 32;
  for (int32_t row = item.part + warp * item.parts; row < rows; row += kWarps * item.parts) {
    const auto place = [&](int32_t part, int32_t pair) {
      return PlaceOfPart<S>(p, item, part, row * (S::kD / 2) + lane * 2 + pair);
    };
    Merged merged[2];
    for (int32_t first = 0; first < item.parts; first += kTogether) {
      uint4 words[kTogether][2];
#pragma unroll
      for (int32_t i = 0; i < 2 * kTogether; ++i) {
        if (first + i / 2 < item.parts) {
          words[i / 2][i % 2] = LoadRelaxed(place(first + i / 2, i % 2));
        }
      }
#pragma unroll
      for (int32_t i = 0; i < 2 * kTogether; ++i) {
        if (first + i / 2 >= item.parts) continue;
        const Merged other = TakePart(place(first + i / 2, i % 2), words[i / 2][i % 2]);
        merged[i % 2].Add(other.max, other.sum, other.out);
      }
    }
    const float inverse = __fdividef(1.0f, merged[0].sum);
    const float v[4] = {merged[0].out.x * inverse, merged[0].out.y * inverse,
                        merged[1].out.x * inverse, merged[1].out.y * inverse};
    LeaveFixed<S>(p, item, row, lane, v);
  }
}

// One pass of a warp's columns: lays them down for another warp, or (`kAdd`) first adds the other's
// to them.
template <typename S, bool kAdd>
__device__ __forceinline__ void ShareRows(const Shared<S>& shared, int32_t pass, int32_t rows,
                                          int32_t merger, int32_t lane, RowState<S>* state) {
  constexpr int32_t kSteps = S::kColumns / 16;
#pragma unroll
  for (int32_t t = 0; t < S::kRowTiles; ++t) {
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t row = t * 8 + 2 * (lane % 4) + i;
      if (row >= rows) continue;
      float* part = shared.parts + (merger * S::kRows + row) * S::kPartStride + lane / 4;
#pragma unroll
      for (int32_t j = 0; j < 2 * kSteps; ++j) {
        float value = state->out[pass * kSteps + j / 2][t][j % 2 * 2 + i];
        if constexpr (kAdd) value = value * state->max[t][i] + part[j * 8] * state->sum[t][i];
        part[j * 8] = value;
      }
    }
  }
}

// Maxima and sums of a warp's rows for another warp, or (`kAdd`) of both for all: then they become
// what the own and the other's outputs are multiplied by.
template <typename S, bool kAdd>
__device__ __forceinline__ void ShareStates(const Shared<S>& shared, int32_t rows, int32_t merger,
                                            int32_t lane, RowState<S>* state) {
#pragma unroll
  for (int32_t t = 0; t < S::kRowTiles; ++t) {
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t row = t * 8 + 2 * (lane % 4) + i;
      float2* to = shared.states + merger * S::kRows + row;
      float2 both = make_float2(state->max[t][i], state->sum[t][i]);
      if (kAdd && row < rows) {
        const float2 other = *to;
        const float max = fmaxf(both.x, other.x);
        state->max[t][i] = Exp2(both.x - max);
        state->sum[t][i] = Exp2(other.x - max);
        both = make_float2(max, both.y * state->max[t][i] + other.y * state->sum[t][i]);
      }
      __syncwarp();
      if (row < rows && lane / 4 == 0) *to = both;
    }
  }
}

// What one pass over the warps' results gives: the item's output, or this part of it.
template <typename S>
__device__ __forceinline__ void WritePass(const AttentionParams& p, const Item& item,
                                          const Shared<S>& shared, int32_t pass, int32_t rows) {
  constexpr int32_t kPairs = S::kColumns / 2;
  for (int32_t i = threadIdx.x; i < rows * kPairs; i += kThreads) {
    const int32_t row = i / kPairs, column = i % kPairs * 2;
    float2 states[kMergers], parts[kMergers];
    Merged merged;
#pragma unroll
    for (int32_t j = 0; j < kMergers; ++j) {
      const int32_t at = j * S::kRows + row;
      states[j] = shared.states[at];
      parts[j] = *reinterpret_cast<const float2*>(shared.parts + at * S::kPartStride + column);
      merged.max = fmaxf(merged.max, states[j].x);
    }
#pragma unroll
    for (int32_t j = 0; j < kMergers; ++j) {
      const float weight = Exp2(states[j].x - merged.max);
      merged.sum = fmaf(states[j].y, weight, merged.sum);
      merged.out.x = fmaf(parts[j].x, weight, merged.out.x);
      merged.out.y = fmaf(parts[j].y, weight, merged.out.y);
    }
    const int32_t whole = pass * S::kColumns + column;
    if (item.parts == 1) {
      WriteOut<S>(p, item, row, whole, merged);
    } else {
      __stcg(PlaceOfPart<S>(p, item, item.part, row * (S::kD / 2) + whole / 2),
             make_uint4(NotZero(merged.out.x), NotZero(merged.out.y), NotZero(merged.max),
                        NotZero(merged.sum)));
    }
  }
}

// The same for fixed point, a row to a warp: of each pass a lane takes columns side by side.
template <typename S>
struct FixedRow {
  static constexpr int32_t kOfPass = S::kColumns / 32;
  static_assert(S::kD == 128 && kOfPass * S::kPasses == 4 && S::kRows <= kWarps);
  float v[4];

  __device__ __forceinline__ void Take(const Shared<S>& shared, int32_t pass, int32_t row,
                                       int32_t lane) {
    using Columns = std::conditional_t<kOfPass == 4, float4, float2>;
    float2 states[kMergers];
    Columns parts[kMergers];
    float max = kNever, sum = 0, out[kOfPass] = {};
#pragma unroll
    for (int32_t j = 0; j < kMergers; ++j) {
      const int32_t at = j * S::kRows + row;
      states[j] = shared.states[at];
      parts[j] =
          *reinterpret_cast<const Columns*>(shared.parts + at * S::kPartStride + lane * kOfPass);
      max = fmaxf(max, states[j].x);
    }
#pragma unroll
    for (int32_t j = 0; j < kMergers; ++j) {
      const float weight = Exp2(states[j].x - max);
      sum = fmaf(states[j].y, weight, sum);
#pragma unroll
      for (int32_t i = 0; i < kOfPass; ++i) {
        out[i] = fmaf(reinterpret_cast<const float*>(&parts[j])[i], weight, out[i]);
      }
    }
    const float inverse = __fdividef(1.0f, sum);
#pragma unroll
    for (int32_t i = 0; i < kOfPass; ++i) v[pass * kOfPass + i] = out[i] * inverse;
  }
  __device__ __forceinline__ void Leave(const AttentionParams& p, const Item& item, int32_t row,
                                        int32_t lane) {
    if constexpr (S::kPasses == 2) {  // two of each half's columns: four side by side
      float from[2][4];
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        from[0][i] = __shfl_sync(0xffffffffu, v[i], lane * 2 % 32);
        from[1][i] = __shfl_sync(0xffffffffu, v[i], lane * 2 % 32 + 1);
      }
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        v[i] = lane < 16 ? from[i / 2][i % 2] : from[i / 2][2 + i % 2];
      }
    }
    LeaveFixed<S>(p, item, row, lane, v);
  }
};

// The warps' results meet. Every thread of the block.
template <typename S>
__device__ __forceinline__ void Finish(const AttentionParams& p, const Item& item, int32_t rows,
                                       const Shared<S>& shared, RowState<S>* state) {
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int32_t t = 0; t < S::kRowTiles; ++t) {
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
#pragma unroll
      for (int32_t offset = 4; offset < 32; offset *= 2) {
        state->sum[t][i] += __shfl_xor_sync(0xffffffffu, state->sum[t][i], offset);
      }
    }
  }
  const int32_t merger = warp % kMergers;
  [[maybe_unused]] std::conditional_t<S::kFixed, FixedRow<S>, int32_t> row;
#pragma unroll
  for (int32_t pass = 0; pass < S::kPasses; ++pass) {
    if (pass > 0) __syncthreads();
    if (warp >= kMergers) {
      if (pass == 0) ShareStates<S, false>(shared, rows, merger, lane, state);
      ShareRows<S, false>(shared, pass, rows, merger, lane, state);
    }
    __syncthreads();
    if (warp < kMergers) {
      if (pass == 0) ShareStates<S, true>(shared, rows, merger, lane, state);
      ShareRows<S, true>(shared, pass, rows, merger, lane, state);
    }
    __syncthreads();
    if constexpr (S::kFixed) {
      if (item.parts == 1) {
        if (warp < rows) row.Take(shared, pass, warp, lane);
        continue;
      }
    }
    WritePass<S>(p, item, shared, pass, rows);
  }
  if constexpr (S::kFixed) {
    if (item.parts == 1 && warp < rows) row.Leave(p, item, warp, lane);
  }
}

// A warp's elements of an item.
template <typename S, bool kRotates>
__device__ __forceinline__ void Attend(const AttentionParams& p, const Item& item, int32_t element,
                                       const Shared<S>& shared, const Offsets<S>& offsets,
                                       int32_t lane, Ring<S>* ring, Feeder<S>* feeder,
                                       RowState<S>* state) {
  const uint32_t queries = SharedAddress(shared.queries);
  const int32_t last_block = item.Last() / kKvBlockTokens;
  for (; element < item.count; element += kWarps) {
    const int32_t block = item.begin + element;
    uint8_t* keys = ring->Wait();
    const bool last = block == last_block;
    if (kRotates && last) PutNewest<S>(item, shared.newest, keys, lane);
    float s[S::kRowTiles][4];
    uint32_t weights[S::kRowTiles][2];
    Scores<S>(SharedAddress(keys) + offsets.keys, queries, lane, s);
    feeder->Issue(p, *ring, ring->slot, kRotates && last, lane);
    ring->Advance();
    Softmax<S>(p, block * kKvBlockTokens, lane, s, state, weights);
    uint8_t* values = ring->Wait();
    if (last) {
      if (kRotates) PutNewest<S>(item, shared.newest + S::kD, values, lane);
      ZeroBehind<S>(item, values, lane);
    }
    AddValues<S>(SharedAddress(values) + offsets.values, weights, state);
    feeder->Issue(p, *ring, ring->slot, last, lane);
    ring->Advance();
  }
}

// What a block's walk over its pages needs besides.
template <typename S>
struct Walk {
  const AttentionParams& p;
  const Shared<S>& shared;
  const Offsets<S>& offsets;
  int32_t warp, lane, group;

  // The page's items, one after the other; true if one of them has left a part.
  template <bool kRotates>
  __device__ __forceinline__ bool Items(int32_t count, bool first_page, Ring<S>* ring) const {
    Feeder<S> feeder{
        .items = shared.items, .count = count, .element = warp, .policy = EvictFirstPolicy()};
    feeder.Seek(p);
    for (int32_t i = 0; i < S::kSlots; ++i) {
      feeder.Issue(p, *ring, (ring->slot + i) % S::kSlots, false, lane);
    }
    Token<S> token;
    if constexpr (kRotates) {
      token.Aim(p, shared.items[0], group, warp, lane);
      if (first_page) WaitForPreviousKernel();
      token.Load(p, lane);
    }
    bool parts = false;
    int32_t element = warp;  // of the item
    for (int32_t i = 0; i < count; ++i) {
      const Item& item = shared.items[i];
      if constexpr (kRotates) {
        token.Take(p, group, shared, item.Last() % kKvBlockTokens, warp, lane);
      } else {
        TakeQueries<S>(p, item, shared);
      }
      RowState<S> state;
      state.Begin(item, group, lane);
      __syncthreads();
      if (kRotates && i + 1 < count) {
        token.Aim(p, shared.items[i + 1], group, warp, lane);
        token.Load(p, lane);
      }
      Attend<S, kRotates>(p, item, element, shared, offsets, lane, ring, &feeder, &state);
      element = (element - item.count % kWarps + kWarps) % kWarps;
      Finish<S>(p, item, item.tokens * group, shared, &state);
      parts = parts || item.parts > 1;
    }
    return parts;
  }
};

template <typename S, bool kRotates>
__global__ void __launch_bounds__(kThreads, 2)
    AttentionKernel(const __grid_constant__ AttentionParams p) {
  LetNextKernelStart();
  extern __shared__ __align__(1024) uint8_t memory[];
  const Shared<S> shared(memory);
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Without rotation even keys and values are the kernel's before this one.
  if constexpr (!kRotates) WaitForPreviousKernel();
  if (static_cast<int32_t>(threadIdx.x) < kWarps * S::kSlots) {
    BarrierInit(shared.full + threadIdx.x, 1);
  }
  FenceBarrierInit();
  __syncthreads();
  const Offsets<S> offsets(lane);
  const Walk<S> walk{p, shared, offsets, warp, lane, p.heads / p.kv_heads};
  Ring<S> ring(shared, warp);
  bool parts = false;
  int32_t pages = 0, count = kPageItems;
  for (; count == kPageItems; ++pages) {
    if (pages > 0) __syncthreads();
    count = LoadPage<S>(p, pages, shared.items);
    __syncthreads();
    if (count > 0) parts = walk.template Items<kRotates>(count, pages == 0, &ring) || parts;
  }
  if constexpr (kRotates) WaitForPreviousKernel();  // blocks without work
  for (int32_t page = 0; parts && page < pages; ++page) {
    if (pages > 1) {
      __syncthreads();
      count = LoadPage<S>(p, page, shared.items);
      __syncthreads();
    }
    for (int32_t i = 0; i < count; ++i) {
      if (shared.items[i].parts == 1) continue;
      if constexpr (S::kFixed) {
        CollectFixed<S>(p, shared.items[i]);
      } else {
        Collect<S>(p, shared.items[i]);
      }
    }
  }
}

template <int32_t kD, int32_t kRows, bool kRotates, bool kFixed = false>
cudaError_t LaunchStream(const AttentionParams& params, const LaunchOptions& options) {
  const auto kernel = AttentionKernel<Shape<kD, kRows, kFixed>, kRotates>;
  // Where the next kernel takes whole multiprocessors, two blocks of this one on some would only
  // leave others to its early ones.
  constexpr int32_t kBytes = kFixed ? kAloneBytes : kSharedBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  return LaunchKernel(kernel,
                      {.grid = dim3(static_cast<uint32_t>(params.blocks)),
                       .block = dim3(kThreads),
                       .shared_bytes = kBytes,
                       .stream = options.stream,
                       .dependent = options.dependent},
                      params);
}

template <int32_t kD>
cudaError_t LaunchUnits(const AttentionParams& params, const LaunchOptions& options) {
  if (params.rotation.cos == nullptr) return LaunchStream<kD, 16, false>(params, options);
  const int32_t group = params.heads / params.kv_heads;
  if constexpr (kD == 128 && kElement == Element::kHalf) {
    if (params.ordered_scales != nullptr) {
      return group <= 4 ? LaunchStream<kD, 4, true, true>(params, options)
                        : LaunchStream<kD, 8, true, true>(params, options);
    }
  }
  if constexpr (kD >= 64) {
    if (group <= 4) return LaunchStream<kD, 4, true>(params, options);
  }
  if (group <= 8) return LaunchStream<kD, 8, true>(params, options);
  return LaunchStream<kD, 16, true>(params, options);
}

cudaError_t LaunchUnitsOf(const AttentionParams& params, const LaunchOptions& options) {
  switch (params.head_dim) {
    case 16:
      return LaunchUnits<16>(params, options);
    case 32:
      return LaunchUnits<32>(params, options);
    case 64:
      return LaunchUnits<64>(params, options);
    default:
      return LaunchUnits<128>(params, options);
  }
}

}  // namespace

cudaError_t Attention(const AttentionParams& params, const LaunchOptions& options) {
  if (!AttentionSupports(params.heads, params.kv_heads, params.head_dim) || params.blocks < 1) {
    return cudaErrorInvalidValue;
  }
  const bool fixed = params.ordered_scales != nullptr;
  if (fixed && (!AttentionLeavesFixed(params.heads, params.kv_heads, params.head_dim) ||
                kElement != Element::kHalf || params.rotation.cos == nullptr ||
                params.ordered == nullptr || params.tile_count > 0)) {
    return cudaErrorInvalidValue;
  }
  if (params.unit_count > 0) {
    const cudaError_t error = LaunchUnitsOf(params, options);
    if (error != cudaSuccess) return error;
  }
  return params.tile_count > 0 ? AttendPrompt(params, options) : cudaSuccess;
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
