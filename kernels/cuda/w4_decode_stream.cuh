// How a warp of the decode product gets its weights and activations and multiplies them; the
// kernel around it is w4_decode.cu.
#pragma once

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/w4_decode.h"

namespace nibble::cuda::decode {

using layout::GpuKIndex;
using layout::GpuSlabBytes;
using layout::kGpuSlabNibbleBytes;

constexpr int32_t kWarps = 8;
constexpr int32_t kThreads = kWarps * 32;
constexpr int32_t kDenseSlabBytes = layout::kGpuTileRows * layout::kGpuSlabColumns * 2;
constexpr int32_t kRingBytes = 12 * 1024;  // of one warp; deeper rings were slower

constexpr int32_t kChunkSlabs = 4;  // of a warp: its activations fit its registers

// What a kernel instance is compiled for. A warp's range of k is at most kChunk slabs: its
// activations stay in registers for the whole launch.
template <int32_t kGroupT, int32_t kTokenTilesT>
struct Shape {
  static constexpr int32_t kGroup = kGroupT;            // 0 = dense fp16
  static constexpr int32_t kTokenTiles = kTokenTilesT;  // 8 tokens each
  static constexpr int32_t kChunk = kChunkSlabs;
  // Registers for the kernel before or behind beside this one; two token tiles take them all.
  static constexpr int32_t kBlocksTogether = kTokenTiles == 1 ? 2 : 1;
  static constexpr int32_t kSlabBytes = kGroup == 0 ? kDenseSlabBytes : GpuSlabBytes(kGroup);
  static constexpr int32_t kCopySlabs = kGroup == 0 ? 1 : kChunk;
  static constexpr int32_t kSlotBytes = kCopySlabs * kSlabBytes;
  static constexpr int32_t kSlots =
      kRingBytes / kSlotBytes < 3 ? 3 : (kRingBytes / kSlotBytes > 8 ? 8 : kRingBytes / kSlotBytes);
  static constexpr int32_t kGroupsOfSlab = kGroup == 0 ? 1 : layout::kGpuSlabColumns / kGroup;
};

// A warp's activations: [slab][k-step][token tile] B fragments, and in shared memory the sums over
// k of every group: [slab][group][token].
template <typename S>
struct Fragments {
  static constexpr int32_t kSumBytes = S::kChunk * S::kGroupsOfSlab * S::kTokenTiles * 8 * 4;

  uint32_t b[S::kChunk][8][S::kTokenTiles][2];
  float* sums;

  // Of tokens 2c, 2c + 1: those of this lane's results.
  __device__ __forceinline__ float2* Sums(int32_t s, int32_t group, int32_t tile,
                                          int32_t lane) const {
    const int32_t at = ((s * S::kGroupsOfSlab + group) * S::kTokenTiles + tile) * 8;
    return reinterpret_cast<float2*>(sums + at + lane % 4 * 2);
  }
};

// Slabs [begin, end) of this warp, in this block's part of the row.
struct WarpRange {
  int32_t begin;
  int32_t end;
};
__device__ __forceinline__ WarpRange SlabRange(int32_t slabs, int32_t part, int32_t parts) {
  return {slabs * part / parts, slabs * (part + 1) / parts};
}

// One lane's 32 activations of a slab and token, in runs of eight. All loads go out before the
// first is used: a load that waits for the one before it costs a trip to the L2. Columns and tokens
// that do not exist load something else and become zero.
template <int32_t kGroup>
__device__ __forceinline__ void LoadSlab(const W4DecodeParams& p, int32_t slab, int32_t token,
                                         int32_t c, bool exists, uint4 (&eights)[4]) {
  const int64_t row = static_cast<int64_t>(token < p.tokens ? token : 0) * p.columns;
  bool valid[4];
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    const int32_t k = slab * layout::kGpuSlabColumns + GpuKIndex(2 * i, c, 0, kGroup);
    valid[i] = exists && token < p.tokens && k < p.columns;
    eights[i] = *reinterpret_cast<const uint4*>(p.x + row + (valid[i] ? k : 0));
  }
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    if (!valid[i]) eights[i] = make_uint4(0, 0, 0, 0);
  }
}

// Fills the fragments of slabs [range.begin, range.end), zero beyond.
template <typename S>
__device__ __forceinline__ void LoadActivations(const W4DecodeParams& p, const WarpRange& range,
                                                int32_t lane, Fragments<S>* x) {
  constexpr int32_t kGroup = S::kGroup == 0 ? 128 : S::kGroup;
#pragma unroll
  for (int32_t s = 0; s < S::kChunk; ++s) {
#pragma unroll
    for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
      uint4 eights[4];
      LoadSlab<kGroup>(p, range.begin + s, tile * 8 + lane / 4, lane % 4,
                       range.begin + s < range.end, eights);
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        x->b[s][2 * i][tile][0] = eights[i].x;
        x->b[s][2 * i][tile][1] = eights[i].y;
        x->b[s][2 * i + 1][tile][0] = eights[i].z;
        x->b[s][2 * i + 1][tile][1] = eights[i].w;
      }
    }
  }
}

// The sums come from the tensor cores: a product with ones puts every token's sum where the lane
// needs it.
template <typename S>
__device__ __forceinline__ void SumGroups(int32_t lane, Fragments<S>* x) {
  if constexpr (S::kGroup == 0) return;
  constexpr int32_t kSteps = (S::kGroup == 0 ? 128 : S::kGroup) / 16;
  constexpr uint32_t kOnes = 0x3c003c00u;
  const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
  for (int32_t s = 0; s < S::kChunk; ++s) {
#pragma unroll
    for (int32_t group = 0; group < S::kGroupsOfSlab; ++group) {
#pragma unroll
      for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
        float sum[4] = {};
#pragma unroll
        for (int32_t ks = group * kSteps; ks < (group + 1) * kSteps; ++ks) {
          MmaF16(sum, ones, x->b[s][ks][tile][0], x->b[s][ks][tile][1]);
        }
        if (lane < 4) *x->Sums(s, group, tile, lane) = make_float2(sum[0], sum[1]);
      }
    }
  }
}

// One word of nibbles to an A fragment: rows r hold 1024 + q, rows r + 8 hold 1024 + 16 q. What is
// too much is taken off the sum of the group, not off every weight: 5 instructions for 8 weights.
__device__ __forceinline__ void Widen(uint32_t w, uint32_t (&a)[4]) {
  constexpr uint32_t kBias = 0x64006400u;
  a[0] = AndOr<0x000f000f>(w, kBias);
  a[1] = AndOr<0x00f000f0>(w, kBias);
  a[2] = AndOr<0x000f000f>(w >> 8, kBias);
  a[3] = AndOr<0x00f000f0>(w >> 8, kBias);
}

struct GroupConstants {
  float scale_low, scale_high;  // of row r; of row r + 8, divided by 16
  float bias_low, bias_high;    // -(1024 + z), -(1024 + 16 z)
};
__device__ __forceinline__ GroupConstants LoadConstants(const uint8_t* slab, int32_t group,
                                                        int32_t lane) {
  const uint8_t* constants = slab + kGpuSlabNibbleBytes + group * layout::kGpuGroupBytes;
  const half2 scales = *reinterpret_cast<const half2*>(constants + lane / 4 * 4);
  const uint32_t zeros = *reinterpret_cast<const uint16_t*>(constants + 32 + lane / 4 * 2);
  constexpr uint32_t kMinus1024 = 0xc4800000u;  // z lands in the mantissa
  return {__low2float(scales), __high2float(scales) * 0.0625f,
          __uint_as_float(kMinus1024 + ((zeros & 0xff) << 13)),
          __uint_as_float(kMinus1024 + ((zeros >> 8) << 17))};
}

// acc += W x over the slabs of a copy; those beyond `count` meet activations that are zero. The
// slabs' products interleave: a chain of dependent tensor-core instructions would wait for each
// one's latency.
template <typename S>
__device__ __forceinline__ void MultiplyW4(const uint8_t* data, int32_t lane, const Fragments<S>& x,
                                           float (&acc)[S::kTokenTiles][4]) {
  constexpr int32_t kSteps = S::kGroup / 16;
  constexpr int32_t kStepsAtOnce = kSteps < 4 ? kSteps : 4;
  float part[S::kChunk][S::kTokenTiles][4] = {};
#pragma unroll
  for (int32_t first = 0; first < 8; first += kStepsAtOnce) {
    uint32_t words[S::kChunk][kStepsAtOnce];
#pragma unroll
    for (int32_t s = 0; s < S::kChunk; ++s) {
      const uint8_t* at = data + s * S::kSlabBytes + first / 4 * 512 + lane * 16 + first % 4 * 4;
      if constexpr (kStepsAtOnce == 4) {
        const uint4 four = LoadShared128(at);
        words[s][0] = four.x;
        words[s][1] = four.y;
        words[s][2] = four.z;
        words[s][3] = four.w;
      } else {
        const uint2 two = *reinterpret_cast<const uint2*>(at);
        words[s][0] = two.x;
        words[s][1] = two.y;
      }
    }
#pragma unroll
    for (int32_t step = 0; step < kStepsAtOnce; ++step) {
#pragma unroll
      for (int32_t s = 0; s < S::kChunk; ++s) {
        uint32_t a[4];
        Widen(words[s][step], a);
#pragma unroll
        for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
          MmaF16(part[s][tile], a, x.b[s][first + step][tile][0], x.b[s][first + step][tile][1]);
        }
      }
    }
    if ((first + kStepsAtOnce) % kSteps != 0) continue;
    const int32_t group = (first + kStepsAtOnce) / kSteps - 1;
#pragma unroll
    for (int32_t s = 0; s < S::kChunk; ++s) {
      const GroupConstants c = LoadConstants(data + s * S::kSlabBytes, group, lane);
#pragma unroll
      for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
        const float2 sums = *x.Sums(s, group, tile, lane);
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float exact = fmaf(i < 2 ? c.bias_low : c.bias_high, i % 2 == 0 ? sums.x : sums.y,
                                   part[s][tile][i]);
          acc[tile][i] = fmaf(i < 2 ? c.scale_low : c.scale_high, exact, acc[tile][i]);
          part[s][tile][i] = 0;
        }
      }
    }
  }
}

template <typename S>
__device__ __forceinline__ void MultiplyDense(const uint8_t* slab, int32_t lane,
                                              const uint32_t (&x)[8][S::kTokenTiles][2],
                                              float (&acc)[S::kTokenTiles][4]) {
  float odd[S::kTokenTiles][4] = {};
#pragma unroll
  for (int32_t ks = 0; ks < 8; ++ks) {
    const uint4 raw = LoadShared128(slab + ks * 512 + lane * 16);
    const uint32_t a[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
      MmaF16(ks % 2 == 0 ? acc[tile] : odd[tile], a, x[ks][tile][0], x[ks][tile][1]);
    }
  }
#pragma unroll
  for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) acc[tile][i] += odd[tile][i];
  }
}

// One warp's stream of weights through its ring of shared memory: for each row tile of the block
// the warp's slabs, in copies of kCopySlabs.
template <typename S>
struct WeightStream {
  static constexpr int32_t kCopies = S::kChunk / S::kCopySlabs;

  uint8_t* ring;
  uint64_t* full;
  uint64_t policy;
  const uint8_t* next;  // where the next copy of the first slab of a tile comes from
  int64_t tile_stride;  // bytes from one row tile of this block to its next
  int32_t slabs;        // of this warp
  int32_t tiles_left;   // not yet asked for
  int32_t copy = 0;
  int32_t ahead_slot = 0;
  int32_t slot = 0;
  uint32_t phase = 0;

  // Lane 0. A copy beyond the warp's slabs moves nothing and completes at once.
  __device__ __forceinline__ void Issue() {
    if (tiles_left == 0) return;
    const int32_t count = min(S::kCopySlabs, slabs - copy * S::kCopySlabs);
    const int32_t bytes = max(count, 0) * S::kSlabBytes;
    BarrierExpect(full + ahead_slot, bytes);
    if (bytes > 0) {
      BulkCopy(ring + ahead_slot * S::kSlotBytes, next + copy * S::kSlotBytes, bytes,
               full + ahead_slot, policy);
    }
    if (++ahead_slot == S::kSlots) ahead_slot = 0;
    if (++copy == kCopies) {
      copy = 0;
      next += tile_stride;
      --tiles_left;
    }
  }
  __device__ __forceinline__ const uint8_t* Acquire() {
    BarrierWait(full + slot, phase);
    return ring + slot * S::kSlotBytes;
  }
  __device__ __forceinline__ void Release(int32_t lane) {
    __syncwarp();
    if (lane == 0) Issue();
    if (++slot == S::kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// One row tile: acc = W x over this warp's range of k.
template <typename S>
__device__ __forceinline__ void MultiplyTile(WeightStream<S>* stream, int32_t lane,
                                             const Fragments<S>& x,
                                             float (&acc)[S::kTokenTiles][4]) {
  if constexpr (S::kGroup == 0) {
#pragma unroll
    for (int32_t copy = 0; copy < WeightStream<S>::kCopies; ++copy) {
      const uint8_t* data = stream->Acquire();
      if (copy < stream->slabs) MultiplyDense<S>(data, lane, x.b[copy], acc);
      stream->Release(lane);
    }
  } else {
    const uint8_t* data = stream->Acquire();
    MultiplyW4<S>(data, lane, x, acc);
    stream->Release(lane);
  }
}

}  // namespace nibble::cuda::decode
