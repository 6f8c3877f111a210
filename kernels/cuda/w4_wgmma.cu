#include "kernels/cuda/w4_wgmma.h"

#include <algorithm>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/w4_output.cuh"
#include "kernels/cuda/w4_wgmma_prompt.cuh"
#include "kernels/cuda/w4_widen.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {
namespace {

constexpr int32_t kGroupThreads = 128;  // of a warpgroup
constexpr int32_t kBlockBytesMax = 227 * 1024;
constexpr int32_t kClusterMax = 8;
constexpr int32_t kDenseSlabBytes = layout::kGpuTileRows * layout::kGpuSlabColumns * 2;

// From the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ float4 LoadFromBlock(uint32_t shared_address, int32_t block) {
  float4 value;
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
      : "r"(shared_address), "r"(block)
      : "memory");
  return value;
}

struct KernelParams {
  W4BatchParams p;
  WgmmaInput input;
  int32_t ordered_tokens;
  int32_t token_tiles;
  int32_t tiles;
  int32_t chunks;  // of a tile, along k
  int32_t blocks;  // that share a tile: a cluster, or each leaves its part
};

__device__ __forceinline__ OrderedOutput NextInput(const KernelParams& k) {
  return {k.input.next_ordered, k.input.next_group, k.ordered_tokens};
}

// What W4WgmmaParts reckons with, whatever the tokens: of a block's tile, and of a part at least.
constexpr int32_t RowTilesOf(int32_t group) { return group == 0 ? 8 : 16; }
constexpr int32_t kPartSlabs = 2;

template <int32_t kGroupT, int32_t kTokensT>
struct Shape {
  static constexpr int32_t kGroup = kGroupT;
  static constexpr int32_t kTokens = kTokensT;
  static constexpr int32_t kMapGroup = kGroup == 0 ? 128 : kGroup;  // of GpuKIndex
  static constexpr int32_t kSlabBytes =
      kGroup == 0 ? kDenseSlabBytes : layout::GpuSlabBytes(kMapGroup);
  static constexpr int32_t kGroups = 128 / kMapGroup;  // of a slab
  // Nibbles less their zeros are multiplied as they are, a slab's sums by its scales afterwards:
  // fewer instructions where a row has few sums and a slab one scale. Registers for four warpgroups
  // then suffice.
  static constexpr bool kFloatScales = kGroup == 128 && kTokens <= 64;
  static constexpr int32_t kConsumers = kFloatScales ? 4 : 2;  // warpgroups
  static constexpr int32_t kConsumerWarps = kConsumers * 4;
  static constexpr int32_t kThreads = (1 + kConsumers) * kGroupThreads;
  // A block has so many for each of its threads; taking more than others gave would wait for ever.
  static constexpr int32_t kRegisters = kFloatScales ? 96 : 168;
  static constexpr int32_t kProducerRegisters = kFloatScales ? 32 : 40;
  static constexpr int32_t kConsumerRegisters = kFloatScales ? 112 : 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                kRegisters * (1 + kConsumers));
  static constexpr int32_t kParts = kFloatScales || kGroup == 0 ? 1 : 2;  // of 64 rows, a warpgroup
  static constexpr int32_t kRowTiles = kConsumerWarps * kParts;           // of 16 rows, a block
  static constexpr int32_t kChunk = kTokens <= 64 && kGroup != 0 ? 2 : 1;  // slabs of a stage
  static_assert(kRowTiles == RowTilesOf(kGroup) && kPartSlabs % kChunk == 0);
  static constexpr int32_t kSteps =
      kTokens <= 64 && kGroup != 0 ? 4 : 2;             // k-steps committed at a time
  static constexpr int32_t kHalfBytes = kTokens * 128;  // 64 k of the tile's tokens
  static constexpr int32_t kStageX = kChunk * 2 * kHalfBytes;
  static constexpr int32_t kRowTileBytes = kChunk * kSlabBytes;
  static constexpr int32_t kStageW = kRowTiles * kRowTileBytes;
  static constexpr int32_t kFit = (kBlockBytesMax - 256) / (kStageX + kStageW);
  static constexpr int32_t kStages = kFit < 8 ? kFit : 8;
  // Stages of weights that are asked for at a time before the ring is full: four slabs of every row
  // tile, 70 to 80 KB. Twice as much kept the first activations waiting 3 to 4 µs (NOTES.md). The
  // head's weights are many more than its activations.
  static constexpr int32_t kEarly = kGroup == 0 ? kStages : 4 / kChunk;
  // Shared memory: activations of all stages, weights, barriers.
  static constexpr int32_t kWeights = kStages * kStageX;
  static constexpr int32_t kBarriers = kWeights + kStages * kStageW;
  static constexpr int32_t kBytes = kBarriers + 2 * kStages * 8;
  // Parts of a tile lie where the ring was.
  static_assert(kConsumers * kParts * kTokens * 2 * kGroupThreads <= kBarriers);
};

// A block's place: its tiles, every so many, and its chunks of each.
struct Place {
  int32_t tile, stride;
  int32_t rank;  // in the cluster
  int32_t begin, end;

  __device__ __forceinline__ explicit Place(const KernelParams& k) {
    rank = static_cast<int32_t>(blockIdx.x) % k.blocks;
    tile = static_cast<int32_t>(blockIdx.x) / k.blocks;
    stride = static_cast<int32_t>(gridDim.x) / k.blocks;
    begin = rank * k.chunks / k.blocks;
    end = (rank + 1) * k.chunks / k.blocks;
  }
};

// Barriers of a stage: full, by the copies; empty, by the consumer warps.
template <typename S>
struct Ring {
  uint8_t* shared;
  int32_t stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ uint64_t* Full(int32_t at) const {
    return reinterpret_cast<uint64_t*>(shared + S::kBarriers) + at;
  }
  __device__ __forceinline__ uint64_t* Empty(int32_t at) const { return Full(S::kStages + at); }
  __device__ __forceinline__ uint8_t* X() const { return shared + stage * S::kStageX; }
  __device__ __forceinline__ uint8_t* W() const {
    return shared + S::kWeights + stage * S::kStageW;
  }
  __device__ __forceinline__ void Advance() {
    if (++stage == S::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// A producer warp's copies of a chunk, one a lane: row tiles of weights, then halves of
// activations. The lanes' copies go out one after the other, in some hundreds of cycles: four warps
// take turns.
template <typename S>
struct Copies {
  const KernelParams& k;
  uint8_t* shared;
  int32_t lane;
  uint64_t policy;
  const uint8_t* from;      // the tile's first chunk
  int64_t chunk_bytes;      // from one to the next
  int32_t to, stage_bytes;  // in a stage, and from one to the next

  __device__ __forceinline__ Copies(const KernelParams& params, uint8_t* memory, int32_t thread)
      : k(params), shared(memory), lane(thread) {
    const bool weights = lane < S::kRowTiles;
    policy = weights && k.token_tiles == 1 ? EvictFirstPolicy() : EvictNormalPolicy();
    chunk_bytes = weights ? S::kRowTileBytes : int64_t{S::kChunk} * 2 * 128 * k.ordered_tokens;
    to = weights ? S::kWeights + lane * S::kRowTileBytes : (lane - S::kRowTiles) * S::kHalfBytes;
    stage_bytes = weights ? S::kStageW : S::kStageX;
  }
  __device__ __forceinline__ void SetTile(int32_t tile) {
    if (lane < S::kRowTiles) {
      const int32_t row_tile =
          min(tile / k.token_tiles * S::kRowTiles + lane, layout::GpuRowTiles(k.p.rows) - 1);
      from = k.p.slabs +
             static_cast<int64_t>(row_tile) * layout::GpuSlabs(k.p.columns) * S::kSlabBytes;
    } else {
      const int64_t row = static_cast<int64_t>(lane - S::kRowTiles) * k.ordered_tokens +
                          tile % k.token_tiles * S::kTokens;
      from = reinterpret_cast<const uint8_t*>(k.input.ordered + row * 64);
    }
  }
  __device__ __forceinline__ void Expect(int32_t chunk, uint64_t* full) const {
    if (lane == 0)
      BarrierExpect(full, Slabs(chunk) * (S::kRowTiles * S::kSlabBytes + 2 * S::kHalfBytes));
    __syncwarp();
  }
  // Lanes [first, last).
  __device__ __forceinline__ void Issue(int32_t chunk, int32_t stage, int32_t first, int32_t last,
                                        uint64_t* full) const {
    const bool weights = lane < S::kRowTiles;
    const int32_t slabs = Slabs(chunk);
    if (lane < first || lane >= min(last, S::kRowTiles + slabs * 2)) return;
    BulkCopy(shared + to + stage * stage_bytes, from + chunk * chunk_bytes,
             weights ? slabs * S::kSlabBytes : S::kHalfBytes, full, policy);
  }

 private:
  __device__ __forceinline__ int32_t Slabs(int32_t chunk) const {
    return min(S::kChunk, layout::GpuSlabs(k.p.columns) - chunk * S::kChunk);
  }
};

// Warps take turns at the chunks of the block's work. No more of them than stages: one that runs
// ahead by more would take a barrier's phase before the last for its own.
template <typename S>
__device__ __forceinline__ void Produce(const KernelParams& k, uint8_t* shared, int32_t turn,
                                        int32_t lane) {
  constexpr int32_t kTurns = S::kStages < 4 ? S::kStages : 4;
  if (turn >= kTurns) return;
  const Place place(k);
  const Ring<S> ring{shared};
  Copies<S> copies(k, shared, lane);
  int32_t tile = place.tile;
  copies.SetTile(tile);
  // Weights depend on nobody: the ring's first are on their way before the kernel before has ended.
  // Not many: what is asked for then stands before the first activations. All warps bring a part of
  // each, so that the first is complete first.
  const int32_t ahead = min(S::kStages, place.end - place.begin), early = min(S::kEarly, ahead);
  constexpr int32_t kShare = (S::kRowTiles + kTurns - 1) / kTurns;
  for (int32_t i = 0; i < early; ++i) {
    if (i % kTurns == turn) copies.Expect(place.begin + i, ring.Full(i));
    copies.Issue(place.begin + i, i, turn * kShare, min((turn + 1) * kShare, S::kRowTiles),
                 ring.Full(i));
  }
  WaitForPreviousKernel();
  LetNextKernelStart();
  int32_t i = turn;
  for (; i < ahead; i += kTurns) {
    if (i >= early) {
      BarrierWait(ring.Full(i - early), 0);
      copies.Expect(place.begin + i, ring.Full(i));
    }
    copies.Issue(place.begin + i, i, i < early ? S::kRowTiles : 0, 32, ring.Full(i));
  }
  // Before a stage is filled again: one that still waited for it would miss its phase.
  asm volatile("bar.sync 2, %0;" ::"n"(kTurns * 32) : "memory");
  for (int32_t chunk = place.begin + i;; i += kTurns, chunk += kTurns) {
    while (chunk >= place.end) {
      chunk -= place.end - place.begin;
      tile += place.stride;
      if (tile >= k.tiles) return;
      copies.SetTile(tile);
    }
    const int32_t stage = i % S::kStages;
    BarrierWait(ring.Empty(stage), (i / S::kStages & 1) ^ 1);
    copies.Expect(chunk, ring.Full(stage));
    copies.Issue(chunk, stage, 0, 32, ring.Full(stage));
  }
}

// A warp's weights of a slab: 16 rows in each part.
template <typename S>
struct SlabWords {
  uint4 words[S::kParts][2];
  half2 scales[S::kParts][S::kGroups];
  uint16_t zeros[S::kParts][S::kGroups];

  __device__ __forceinline__ void Load(const uint8_t* slab, int32_t lane) {
#pragma unroll
    for (int32_t part = 0; part < S::kParts; ++part) {
      const uint8_t* from = slab + part * 4 * S::kRowTileBytes;
      words[part][0] = LoadShared128(from + lane * 16);
      words[part][1] = LoadShared128(from + 512 + lane * 16);
#pragma unroll
      for (int32_t group = 0; group < S::kGroups; ++group) {
        const uint8_t* constants =
            from + layout::kGpuSlabNibbleBytes + group * layout::kGpuGroupBytes;
        scales[part][group] = *reinterpret_cast<const half2*>(constants + lane / 4 * 4);
        zeros[part][group] = *reinterpret_cast<const uint16_t*>(constants + 32 + lane / 4 * 2);
      }
    }
  }
};

template <typename S>
struct Consumer {
  static constexpr int32_t kValues = S::kTokens / 2;
  float acc[S::kParts][kValues];
  // One set is multiplied while the other is made.
  uint32_t a[2][S::kSteps][S::kParts][4];
  float sum[S::kFloatScales ? kValues : 1];  // with kFloatScales: over the slabs before

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int32_t part = 0; part < S::kParts; ++part) {
#pragma unroll
      for (int32_t i = 0; i < kValues; ++i) acc[part][i] = 0;
    }
#pragma unroll
    for (float& value : sum) value = 0;
  }
  __device__ __forceinline__ void Pin() {
#pragma unroll
    for (int32_t part = 0; part < S::kParts; ++part) PinRegisters(acc[part]);
  }

  // B of a k-step of a slab.
  static __device__ __forceinline__ uint64_t Step(uint64_t b, int32_t step) {
    return Further(b, step / 4 * S::kHalfBytes + step % 4 * 32);
  }

  // Multiplies k-steps [set * kSteps, …) of a slab from the fragments in a[set % 2].
  __device__ __forceinline__ void Issue(int32_t set, uint64_t b) {
    WarpgroupFence();
#pragma unroll
    for (int32_t i = 0; i < S::kSteps; ++i) {
#pragma unroll
      for (int32_t part = 0; part < S::kParts; ++part) {
        WarpgroupMma<S::kTokens>::Add(acc[part], a[set % 2][i][part], Step(b, set * S::kSteps + i));
      }
    }
    WarpgroupCommit();
    WarpgroupWait<1>();
  }

  // With kFloatScales: a slab in halves, and its sums by its scales.
  __device__ __forceinline__ void MultiplyUnscaled(const uint8_t* slab, uint64_t b, int32_t lane) {
    SlabWords<S> w;
    w.Load(slab, lane);
    const GroupZeros zeros = MakeZeros(w.zeros[0][0]);
#pragma unroll
    for (int32_t set = 0; set < 2; ++set) {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) WidenUnscaled(Word(w.words[0][set], i), zeros, a[set][i][0]);
      WarpgroupFence();
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        if (set == 0 && i == 0) {
          WarpgroupMma<S::kTokens>::template Add<false, true>(acc[0], a[set][i][0], Step(b, i));
        } else {
          WarpgroupMma<S::kTokens>::Add(acc[0], a[set][i][0], Step(b, set * 4 + i));
        }
      }
      WarpgroupCommit();
    }
    WarpgroupWait<0>();
    PinRegisters(acc[0]);
    const float2 scale = UnscaledFactors(w.scales[0][0]);
#pragma unroll
    for (int32_t i = 0; i < kValues; ++i) {
      sum[i] += acc[0][i] * (i / 2 % 2 == 0 ? scale.x : scale.y);
    }
  }

  // `done` is arrived at when the slab before is no longer read.
  __device__ __forceinline__ void MultiplySlab(const uint8_t* slab, uint64_t b, int32_t lane,
                                               uint64_t* done) {
    if constexpr (S::kFloatScales) {
      MultiplyUnscaled(slab, b, lane);
      return;
    }
    SlabWords<S> w;
    if constexpr (S::kGroup != 0) w.Load(slab, lane);
    GroupConstants constants[S::kParts];
#pragma unroll
    for (int32_t set = 0; set < 8 / S::kSteps; ++set) {
#pragma unroll
      for (int32_t i = 0; i < S::kSteps; ++i) {
        const int32_t step = set * S::kSteps + i;
#pragma unroll
        for (int32_t part = 0; part < S::kParts; ++part) {
          if constexpr (S::kGroup == 0) {
            const uint4 four = LoadShared128(slab + step * 512 + lane * 16);
            a[set % 2][i][part][0] = four.x;
            a[set % 2][i][part][1] = four.y;
            a[set % 2][i][part][2] = four.z;
            a[set % 2][i][part][3] = four.w;
          } else {
            constexpr int32_t kStepsOfGroup = S::kMapGroup / 16;
            if (step % kStepsOfGroup == 0) {
              constants[part] = MakeConstants(w.scales[part][step / kStepsOfGroup],
                                              w.zeros[part][step / kStepsOfGroup]);
            }
            Widen(Word(w.words[part][step / 4], step % 4), constants[part], a[set % 2][i][part]);
          }
        }
      }
      Issue(set, b);
      if (set == 0 && done != nullptr && lane == 0) BarrierArrive(done);
    }
  }

  // With kFloatScales, behind the last slab: results into acc.
  __device__ __forceinline__ void TakeSums() {
#pragma unroll
    for (int32_t i = 0; i < kValues; ++i) acc[0][i] = sum[i];
  }

  // Leaves the block's part of a tile.
  __device__ __forceinline__ void StorePart(const KernelParams& k, int32_t rank, int32_t row_tile,
                                            int32_t first_token, int32_t lane) {
#pragma unroll
    for (int32_t part = 0; part < S::kParts; ++part) {
      if (row_tile + part * 4 >= layout::GpuRowTiles(k.p.rows)) break;
      StorePartialSums(k.p, k.input.parts, rank, {row_tile + part * 4, first_token, lane},
                       acc[part]);
    }
  }

  __device__ __forceinline__ void Store(const W4BatchParams& p, const OrderedOutput& next,
                                        int32_t row_tile, int32_t first_token, int32_t lane) {
#pragma unroll
    for (int32_t part = 0; part < S::kParts; ++part) {
      if (row_tile + part * 4 >= layout::GpuRowTiles(p.rows)) break;
      StoreRowTile(p, next, {row_tile + part * 4, first_token, lane}, acc[part]);
    }
  }
};

template <int32_t kThreads>
__device__ __forceinline__ void MeetConsumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// The blocks of a cluster have each multiplied their k: adds their parts up, each block its share
// of the tile, in the blocks' order, and stores it.
template <typename S>
__device__ __forceinline__ void StoreShare(const KernelParams& k, const Place& place,
                                           const Consumer<S>& consumer, int32_t group,
                                           int32_t thread, uint8_t* shared) {
  constexpr int32_t kValues = Consumer<S>::kValues;
  constexpr int32_t kQuads = S::kParts * kValues / 4;
  auto* own = reinterpret_cast<float4*>(shared) + group * kQuads * kGroupThreads + thread;
  MeetConsumers<S::kConsumers * kGroupThreads>();  // no group reads the ring any longer
#pragma unroll
  for (int32_t i = 0; i < kQuads; ++i) {
    const float* from = &consumer.acc[i * 4 / kValues][i * 4 % kValues];
    own[i * kGroupThreads] = make_float4(from[0], from[1], from[2], from[3]);
  }
  ArriveCluster();
  WaitForCluster();
  const int32_t end = (place.rank + 1) * kQuads / k.blocks;
  for (int32_t quad = place.rank * kQuads / k.blocks; quad < end; ++quad) {
    const uint32_t address = SharedAddress(own + quad * kGroupThreads);
    float4 parts[kClusterMax];
#pragma unroll
    for (int32_t block = 0; block < kClusterMax; ++block) {
      if (block < k.blocks) parts[block] = LoadFromBlock(address, block);
    }
    float sum[4] = {parts[0].x, parts[0].y, parts[0].z, parts[0].w};
#pragma unroll
    for (int32_t block = 1; block < kClusterMax; ++block) {
      if (block >= k.blocks) break;
      sum[0] += parts[block].x;
      sum[1] += parts[block].y;
      sum[2] += parts[block].z;
      sum[3] += parts[block].w;
    }
    const int32_t part = quad / (S::kTokens / 8), eight = quad % (S::kTokens / 8);
    const int32_t row_tile =
        place.tile / k.token_tiles * S::kRowTiles + (group * S::kParts + part) * 4 + thread / 32;
    if (row_tile >= layout::GpuRowTiles(k.p.rows)) continue;
    StoreRowTile(k.p, NextInput(k),
                 {row_tile, place.tile % k.token_tiles * S::kTokens + eight * 8, thread % 32}, sum);
  }
  // Others may still read what lies here.
  ArriveCluster();
  WaitForCluster();
}

// The block's chunks of a tile.
template <typename S>
__device__ __forceinline__ void MultiplyTile(const KernelParams& k, const Place& place,
                                             int32_t row_tile, int32_t lane, Ring<S>* ring,
                                             Consumer<S>* consumer) {
  consumer->Clear();
  consumer->Pin();
  uint64_t* done = nullptr;
  for (int32_t chunk = place.begin; chunk < place.end; ++chunk) {
    BarrierWait(ring->Full(ring->stage), ring->phase);
    const uint8_t* slab = ring->W() + row_tile * S::kRowTileBytes;
    const uint64_t b = UniformRows(ring->X());
    consumer->MultiplySlab(slab, b, lane, done);
    if constexpr (S::kChunk == 2) {
      if (chunk * 2 + 1 < layout::GpuSlabs(k.p.columns)) {
        consumer->MultiplySlab(slab + S::kSlabBytes, Further(b, 2 * S::kHalfBytes), lane, nullptr);
      }
    }
    done = ring->Empty(ring->stage);
    if (S::kFloatScales && lane == 0) BarrierArrive(done);
    ring->Advance();
  }
  WarpgroupWait<0>();
  consumer->Pin();
  if constexpr (S::kFloatScales) {
    consumer->TakeSums();
  } else if (lane == 0) {
    BarrierArrive(done);
  }
}

template <typename S>
__device__ __forceinline__ void Consume(const KernelParams& k, uint8_t* shared, int32_t group) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x) % kGroupThreads;
  const int32_t lane = thread % 32;
  // Of the block's; the next part's: + 4.
  const int32_t row_tile = group * S::kParts * 4 + thread / 32;
  WaitForPreviousKernel();
  const Place place(k);
  Ring<S> ring{shared};
  Consumer<S> consumer;
  for (int32_t tile = place.tile; tile < k.tiles; tile += place.stride) {
    MultiplyTile<S>(k, place, row_tile, lane, &ring, &consumer);
    if (k.input.parts != nullptr) {
      consumer.StorePart(k, place.rank, tile / k.token_tiles * S::kRowTiles + row_tile,
                         tile % k.token_tiles * S::kTokens, lane);
      continue;
    }
    if (k.blocks > 1) {
      StoreShare<S>(k, place, consumer, group, thread, shared);
      return;
    }
    consumer.Store(k.p, NextInput(k), tile / k.token_tiles * S::kRowTiles + row_tile,
                   tile % k.token_tiles * S::kTokens, lane);
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    W4WgmmaKernel(const __grid_constant__ KernelParams k) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  if (threadIdx.x == 0) {
    const Ring<S> ring{shared};
    for (int32_t i = 0; i < S::kStages; ++i) {
      BarrierInit(ring.Full(i), 1);
      BarrierInit(ring.Empty(i), S::kConsumerWarps);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  const int32_t group = static_cast<int32_t>(threadIdx.x) / kGroupThreads;
  if (group == S::kConsumers) {
    GiveRegisters<S::kProducerRegisters>();
    const int32_t thread = static_cast<int32_t>(threadIdx.x) % kGroupThreads;
    Produce<S>(k, shared, thread / 32, thread % 32);
  } else {
    TakeRegisters<S::kConsumerRegisters>();
    Consume<S>(k, shared, group);
  }
#endif
}

// Blocks that share a tile: as many as run at the same time with all tiles' others.
template <typename S>
int32_t BlocksOfTile(int32_t tiles, int32_t chunks, int32_t multiprocessors) {
  for (int32_t blocks = kClusterMax; blocks > 1; --blocks) {
    if (blocks * tiles > multiprocessors || blocks * 2 > chunks) continue;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<uint32_t>(blocks), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<uint32_t>(blocks * tiles));
    config.blockDim = dim3(S::kThreads);
    config.dynamicSmemBytes = S::kBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int32_t clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, W4WgmmaKernel<S>, &config) == cudaSuccess &&
        clusters >= tiles) {
      return blocks;
    }
  }
  return 1;
}

template <typename S>
cudaError_t LaunchShapeOf(const W4BatchParams& params, const WgmmaInput& input,
                          int32_t multiprocessors, const LaunchOptions& options) {
  const cudaError_t error = cudaFuncSetAttribute(
      W4WgmmaKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (error != cudaSuccess) return error;
  const auto parts_of = [](int32_t count, int32_t size) { return (count + size - 1) / size; };
  KernelParams k{.p = params, .input = input};
  k.ordered_tokens = layout::GpuOrderedTokens(params.tokens);
  k.token_tiles = k.ordered_tokens / S::kTokens;
  k.tiles = parts_of(layout::GpuRowTiles(params.rows), S::kRowTiles) * k.token_tiles;
  k.chunks = parts_of(layout::GpuSlabs(params.columns), S::kChunk);
  const bool parts = input.parts != nullptr;
  k.blocks = parts ? W4WgmmaParts(params, multiprocessors)
                   : BlocksOfTile<S>(k.tiles, k.chunks, multiprocessors);
  const int32_t grid = k.blocks > 1 ? k.tiles * k.blocks : std::min(k.tiles, multiprocessors);
  return LaunchKernel(W4WgmmaKernel<S>,
                      {.grid = dim3(static_cast<uint32_t>(grid)),
                       .block = dim3(S::kThreads),
                       .shared_bytes = S::kBytes,
                       .stream = options.stream,
                       .dependent = options.dependent,
                       .cluster = parts ? 1 : k.blocks},
                      k);
}

template <int32_t kGroup, typename... Rest>
cudaError_t LaunchGroup(const W4BatchParams& params, const Rest&... rest) {
  switch (layout::GpuTokenTile(params.tokens)) {
    case 16:
      return LaunchShapeOf<Shape<kGroup, 16>>(params, rest...);
    case 32:
      return LaunchShapeOf<Shape<kGroup, 32>>(params, rest...);
    case 64:
      return LaunchShapeOf<Shape<kGroup, 64>>(params, rest...);
    case 96:
      return LaunchShapeOf<Shape<kGroup, 96>>(params, rest...);
    default:
      return LaunchShapeOf<Shape<kGroup, 128>>(params, rest...);
  }
}

}  // namespace

int32_t W4WgmmaParts(const W4BatchParams& params, int32_t multiprocessors) {
  const int32_t rows_of_tile = RowTilesOf(params.group) * layout::kGpuTileRows;
  const int32_t tiles = (params.rows + rows_of_tile - 1) / rows_of_tile;
  const int32_t chunks = (layout::GpuSlabs(params.columns) + kPartSlabs - 1) / kPartSlabs;
  const int32_t parts = std::clamp(multiprocessors / tiles, 1, std::min(chunks, kWgmmaPartsMax));
  // No more than the longest needs.
  const int32_t longest = (chunks + parts - 1) / parts;
  return (chunks + longest - 1) / longest;
}

cudaError_t W4Wgmma(const W4BatchParams& params, const WgmmaInput& input, int32_t multiprocessors,
                    const LaunchOptions& options) {
  if (params.tokens < 1 || params.columns % 8 != 0) return cudaErrorInvalidValue;
  if (input.parts == nullptr && PromptTilesFit(params, multiprocessors)) {
    return W4WgmmaPrompt(params, input, multiprocessors, options);
  }
  switch (params.group) {
    case 0:
      return LaunchGroup<0>(params, input, multiprocessors, options);
    case 32:
      return LaunchGroup<32>(params, input, multiprocessors, options);
    case 64:
      return LaunchGroup<64>(params, input, multiprocessors, options);
    case 128:
      return LaunchGroup<128>(params, input, multiprocessors, options);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
