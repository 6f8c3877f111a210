// How weights and activations of a batch product come into shared memory: what a kernel instance is
// compiled for, a block's place, its ring, and the four warps that fill it.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/w4_output.cuh"
#include "kernels/cuda/w4_wgmma.h"
#include "kernels/layout/gpu_w4.h"
#include "kernels/layout/gpu_x.h"

namespace nibble::cuda::NIBBLE_ELEMENT {

constexpr int32_t kGroupThreads = 128;  // of a warpgroup
constexpr int32_t kBlockBytesMax = 227 * 1024;
constexpr int32_t kDenseSlabBytes = layout::kGpuTileRows * layout::kGpuSlabColumns * 2;
// Products that meet, take normed inputs or fixed point have run with fp16 alone.
constexpr bool kMeetings = kElement == Element::kHalf;

struct KernelParams {
  W4BatchParams p;
  WgmmaInput input;
  int32_t ordered_tokens;
  int32_t token_tiles;
  int32_t tiles;
  int32_t chunks;  // of a tile, along k
  int32_t blocks;  // that share a tile: a cluster, or each leaves its part
  float* parts;    // of whichever kind, or nullptr
  WgmmaHelp help;  // idle blocks that help, or none
};

__device__ __forceinline__ OrderedOutput NextInput(const KernelParams& k) {
  return {k.input.next_ordered, k.input.next_group, k.ordered_tokens};
}

template <int32_t kGroupT, int32_t kTokensT, bool kFixedT = false>
struct Shape {
  static constexpr int32_t kGroup = kGroupT;
  static constexpr int32_t kTokens = kTokensT;
  // What results of normed inputs are multiplied by.
  static constexpr bool kFactors = kMeetings && kTokens <= kWgmmaMeetingTokens;
  // The first chunk stands before the loop over the others, which the factors would make longer.
  static constexpr bool kPeeled = kFactors && kGroupT == 128 && kWgmmaFixedTokens < kTokens;
  static constexpr bool kFixed = kFixedT;                           // activations in fixed point
  static constexpr int32_t kMapGroup = kGroup == 0 ? 128 : kGroup;  // of GpuKIndex
  static constexpr int32_t kSlabBytes =
      kGroup == 0 ? kDenseSlabBytes : layout::GpuSlabBytes(kMapGroup);
  [[maybe_unused]] static constexpr int32_t kGroups = 128 / kMapGroup;  // of a slab
  // Nibbles less their zeros are multiplied as they are, a slab's sums by its scales afterwards:
  // fewer instructions where a row has few sums and a slab one scale. Registers for four warpgroups
  // then suffice.
  static constexpr bool kFloatScales = kGroup == 128 && kTokens <= 64;
  // Idle multiprocessors may help.
  static constexpr bool kHelped = kFloatScales && kTokens == kWgmmaHelpTokens;
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
  static_assert(kRowTiles == WgmmaRowTiles(kGroup) && kWgmmaChunkSlabs % kChunk == 0);
  static constexpr int32_t kSteps =
      kTokens <= 64 && kGroup != 0 ? 4 : 2;             // k-steps committed at a time
  static constexpr int32_t kHalfBytes = kTokens * 128;  // 64 k of the tile's tokens
  static constexpr int32_t kStageX = kChunk * 2 * kHalfBytes;
  static constexpr int32_t kScaleBytes = kFixed ? 2 * kTokens * 4 : 0;  // of a slab's tokens
  static constexpr int32_t kRowTileBytes = kChunk * kSlabBytes;
  static constexpr int32_t kStageW = kRowTiles * kRowTileBytes + kChunk * kScaleBytes;
  static constexpr int32_t kFactorBytes = kFactors ? kTokens * 4 : 0;
  // Results of SiLU on their way into fixed point: rows of tokens, which keep to banks of their
  // own.
  static constexpr int32_t kResultRow = kRowTiles * layout::kGpuTileRows / 2 + 4;
  static constexpr int32_t kResultBytes = kFixed ? kTokens * kResultRow * 4 : 0;
  static constexpr int32_t kFit =
      (kBlockBytesMax - 256 - kFactorBytes - kResultBytes) / (kStageX + kStageW);
  static constexpr int32_t kStages = kFit < 8 ? kFit : 8;
  // Stages of weights that are asked for at a time before the ring is full: many keep the first
  // activations waiting, few leave the memory idle until these have come (NOTES.md). The head's
  // weights are many more than its activations.
  static constexpr int32_t kEarly = kGroup == 0                                ? kStages
                                    : kFactors && kTokens <= kWgmmaFixedTokens ? 6 / kChunk
                                                                               : 4 / kChunk;
  // In fixed point, of a block with more than twice as many chunks as its ring has stages; the
  // others are asked for right behind the first activations.
  static constexpr int32_t kEarlyOfMany = 2;
  // Shared memory: activations of all stages, weights and scales, barriers, factors, results.
  static constexpr int32_t kWeights = kStages * kStageX;
  static constexpr int32_t kBarriers = kWeights + kStages * kStageW;
  static constexpr int32_t kFactorsAt = kBarriers + (2 * kStages + 1) * 8;
  static constexpr int32_t kResults = (kFactorsAt + kFactorBytes + 15) / 16 * 16;
  static constexpr int32_t kBytes = kResults + kResultBytes;
  // Parts of a tile lie where the ring was.
  static_assert(kConsumers * kParts * kTokens * 2 * kGroupThreads <= kBarriers);
};

// A block's place: its tiles, every so many, and its chunks of each.
struct Place {
  int32_t tile, stride;
  int32_t rank;  // in the cluster
  bool helps;    // others with their tiles
  int32_t begin, end;

  __device__ __forceinline__ Place(const KernelParams& k, bool helped) {
    if (helped && k.help.blocks > 0) {
      const auto block = static_cast<int32_t>(blockIdx.x);
      helps = block < k.help.blocks;
      tile = helps ? block : block - k.help.blocks;
      stride = helps ? k.help.blocks : static_cast<int32_t>(gridDim.x) - k.help.blocks;
      rank = 0;
      begin = helps ? k.chunks - k.help.chunks : 0;
      end = helps ? k.chunks : k.chunks - k.help.chunks;
      return;
    }
    helps = false;
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
  // Of the factors: arrived at once, by all consumer warps.
  __device__ __forceinline__ uint64_t* Factored() const { return Full(2 * S::kStages); }
  __device__ __forceinline__ float* Factors() const {
    return reinterpret_cast<float*>(shared + S::kFactorsAt);
  }
  __device__ __forceinline__ uint8_t* X() const { return shared + stage * S::kStageX; }
  __device__ __forceinline__ uint8_t* W() const {
    return shared + S::kWeights + stage * S::kStageW;
  }
  __device__ __forceinline__ const float* Scales() const {
    return reinterpret_cast<const float*>(W() + S::kRowTiles * S::kRowTileBytes);
  }
  __device__ __forceinline__ void Advance() {
    if (++stage == S::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// A producer warp's copies of a chunk, one a lane: row tiles of weights, then halves of
// activations, then the scales of activations in fixed point. The lanes' copies go out one after
// the other, in some hundreds of cycles: four warps take turns.
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
    if (S::kFixed && lane == kScaleLane) {
      chunk_bytes = S::kChunk * S::kScaleBytes;
      to = S::kWeights + S::kRowTiles * S::kRowTileBytes;
      stage_bytes = S::kStageW;
    }
  }
  __device__ __forceinline__ void SetTile(int32_t tile) {
    if (lane < S::kRowTiles) {
      const int32_t row_tile =
          min(tile / k.token_tiles * S::kRowTiles + lane, layout::GpuRowTiles(k.p.rows) - 1);
      from = k.p.slabs +
             static_cast<int64_t>(row_tile) * layout::GpuSlabs(k.p.columns) * S::kSlabBytes;
    } else if (S::kFixed && lane == kScaleLane) {
      from = reinterpret_cast<const uint8_t*>(k.input.fixed_scales);
    } else {
      const int64_t row = static_cast<int64_t>(lane - S::kRowTiles) * k.ordered_tokens +
                          tile % k.token_tiles * S::kTokens;
      from = reinterpret_cast<const uint8_t*>(k.input.ordered + row * 64);
    }
  }
  __device__ __forceinline__ void Expect(int32_t chunk, uint64_t* full) const {
    if (lane == 0)
      BarrierExpect(
          full, Slabs(chunk) * (S::kRowTiles * S::kSlabBytes + 2 * S::kHalfBytes + S::kScaleBytes));
    __syncwarp();
  }
  // Lanes [first, last).
  __device__ __forceinline__ void Issue(int32_t chunk, int32_t stage, int32_t first, int32_t last,
                                        uint64_t* full) const {
    const bool weights = lane < S::kRowTiles;
    const int32_t slabs = Slabs(chunk);
    const bool scales = S::kFixed && lane == kScaleLane;
    if (lane < first || lane >= last || (lane >= S::kRowTiles + slabs * 2 && !scales)) return;
    BulkCopy(shared + to + stage * stage_bytes, from + chunk * chunk_bytes,
             weights  ? slabs * S::kSlabBytes
             : scales ? slabs * S::kScaleBytes
                      : S::kHalfBytes,
             full, policy);
  }

 private:
  static constexpr int32_t kScaleLane = S::kRowTiles + S::kChunk * 2;

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
  const Place place(k, S::kHelped);
  const Ring<S> ring{shared};
  Copies<S> copies(k, shared, lane);
  int32_t tile = place.tile;
  copies.SetTile(tile);
  // Weights depend on nobody: the ring's first are on their way before the kernel before has ended.
  // Not many: what is asked for then stands before the first activations. All warps bring a part of
  // each, so that the first is complete first.
  const bool fill = S::kFixed && place.end - place.begin > 2 * S::kStages;
  const int32_t ahead = min(S::kStages, place.end - place.begin),
                early = min(fill ? S::kEarlyOfMany : S::kEarly, ahead);
  // Of few tokens the last warp has the first activations for itself: they go out at once.
  constexpr bool kApart = S::kFactors;
  constexpr int32_t kSharers = kApart ? kTurns - 1 : kTurns;
  constexpr int32_t kShare = (S::kRowTiles + kSharers - 1) / kSharers;
  for (int32_t i = 0; i < early; ++i) {
    if (i % kTurns == turn) copies.Expect(place.begin + i, ring.Full(i));
    copies.Issue(place.begin + i, i, turn * kShare, min((turn + 1) * kShare, S::kRowTiles),
                 ring.Full(i));
  }
  WaitForPreviousKernel();
  LetNextKernelStart();
  for (int32_t first = 0; kApart && turn == kTurns - 1 && first < early; ++first) {
    copies.Issue(place.begin + first, first, S::kRowTiles, 32, ring.Full(first));
  }
  int32_t i = turn;
  for (; i < ahead; i += kTurns) {
    if (kApart && i < early) continue;
    if (i >= early) {
      if (!fill) BarrierWait(ring.Full(i - early), 0);
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

}  // namespace nibble::cuda::NIBBLE_ELEMENT
