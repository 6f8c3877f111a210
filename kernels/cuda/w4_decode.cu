#include "kernels/cuda/w4_decode.h"

#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda {
namespace {

using layout::GpuKIndex;
using layout::GpuSlabBytes;
using layout::kGpuSlabNibbleBytes;

constexpr int32_t kWarps = 8;
constexpr int32_t kThreads = kWarps * 32;
constexpr int32_t kDenseSlabBytes = layout::kGpuTileRows * layout::kGpuSlabColumns * 2;
constexpr int32_t kRingBytes = 12 * 1024;  // of one warp: 96 KB a block, so that two blocks fit
constexpr int32_t kRoundTiles = 8;         // row tiles between two meetings of a cluster

// What a kernel instance is compiled for. A warp's range of k is at most kChunk slabs: its
// activations stay in registers for the whole launch. Longer rows are split over the blocks of a
// cluster.
template <int32_t kGroupT, int32_t kTokenTilesT>
struct Shape {
  static constexpr int32_t kGroup = kGroupT;            // 0 = dense fp16
  static constexpr int32_t kTokenTiles = kTokenTilesT;  // 8 tokens each
  static constexpr int32_t kChunk = 4 / kTokenTiles;
  static constexpr int32_t kSlabBytes = kGroup == 0 ? kDenseSlabBytes : GpuSlabBytes(kGroup);
  static constexpr int32_t kCopySlabs = kGroup == 0 ? 1 : kChunk;
  static constexpr int32_t kSlotBytes = kCopySlabs * kSlabBytes;
  static constexpr int32_t kSlots =
      kRingBytes / kSlotBytes < 3 ? 3 : (kRingBytes / kSlotBytes > 8 ? 8 : kRingBytes / kSlotBytes);
  static constexpr int32_t kGroupsOfSlab = kGroup == 0 ? 1 : layout::kGpuSlabColumns / kGroup;
};

// A warp's activations: [slab][k-step][token tile] B fragments, and per group the sums over k of
// the two tokens that this lane's results belong to.
template <typename S>
struct Fragments {
  uint32_t b[S::kChunk][8][S::kTokenTiles][2];
  float sums[S::kChunk][S::kGroupsOfSlab][S::kTokenTiles][2];
};

// Slabs [begin, end) of this warp, in this block's part of the row.
struct WarpRange {
  int32_t begin;
  int32_t end;
};
__device__ __forceinline__ WarpRange SlabRange(int32_t slabs, int32_t part, int32_t parts) {
  return {slabs * part / parts, slabs * (part + 1) / parts};
}

// 1 / rms of the tokens this lane's fragments belong to. The whole warp loads each token's parts,
// all loads in flight at once: one after the other they cost a trip to the L2 each.
template <typename S>
__device__ __forceinline__ void LoadInverseRms(const W4DecodeParams& p, int32_t lane,
                                               float (&inverse_rms)[S::kTokenTiles]) {
  constexpr int32_t kLoads = kDecodeBlocksMax / 32;
#pragma unroll
  for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) inverse_rms[tile] = 0;
  for (int32_t token = 0; token < p.tokens; ++token) {
    float parts[kLoads];
#pragma unroll
    for (int32_t i = 0; i < kLoads; ++i) {
      const int32_t part = i * 32 + lane;
      parts[i] = part < p.square_parts ? p.square_sums[token * p.square_parts + part] : 0.0f;
    }
    float sum = 0;
#pragma unroll
    for (int32_t i = 0; i < kLoads; ++i) sum += parts[i];
#pragma unroll
    for (int32_t offset = 1; offset < 32; offset *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    const float inverse = rsqrtf(sum / static_cast<float>(p.columns) + p.epsilon);
#pragma unroll
    for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
      if (token == tile * 8 + lane / 4) inverse_rms[tile] = inverse;
    }
  }
}

__device__ __forceinline__ uint32_t PackHalf2(float low, float high) {
  const half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// One lane's 32 activations of a slab and token, from column k on in runs of eight. All loads go
// out before the first is used: a load that waits for the one before it costs a trip to the L2.
// Columns and tokens that do not exist load something else and become zero.
template <int32_t kGroup, DecodeInput kInput>
__device__ __forceinline__ void LoadSlab(const W4DecodeParams& p, int32_t slab, int32_t token,
                                         int32_t c, float inverse_rms, bool exists,
                                         uint4 (&eights)[4]) {
  const int64_t row = static_cast<int64_t>(token < p.tokens ? token : 0) * p.columns;
  int32_t k[4];
  bool valid[4];
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    k[i] = slab * layout::kGpuSlabColumns + GpuKIndex(2 * i, c, 0, kGroup);
    valid[i] = exists && token < p.tokens && k[i] < p.columns;
    if (!valid[i]) k[i] = 0;
  }
  if constexpr (kInput == DecodeInput::kHalf) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      eights[i] = *reinterpret_cast<const uint4*>(p.x_half + row + k[i]);
    }
  } else {
    float4 x[8];
    uint4 weights[4];
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      x[2 * i] = *reinterpret_cast<const float4*>(p.residual + row + k[i]);
      x[2 * i + 1] = *reinterpret_cast<const float4*>(p.residual + row + k[i] + 4);
      weights[i] = *reinterpret_cast<const uint4*>(p.norm_weight + k[i]);
    }
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      const half2* w = reinterpret_cast<const half2*>(&weights[i]);
      const float2 w0 = __half22float2(w[0]), w1 = __half22float2(w[1]), w2 = __half22float2(w[2]),
                   w3 = __half22float2(w[3]);
      const float4 low = x[2 * i], high = x[2 * i + 1];
      eights[i] = make_uint4(PackHalf2(low.x * inverse_rms * w0.x, low.y * inverse_rms * w0.y),
                             PackHalf2(low.z * inverse_rms * w1.x, low.w * inverse_rms * w1.y),
                             PackHalf2(high.x * inverse_rms * w2.x, high.y * inverse_rms * w2.y),
                             PackHalf2(high.z * inverse_rms * w3.x, high.w * inverse_rms * w3.y));
    }
  }
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    if (!valid[i]) eights[i] = make_uint4(0, 0, 0, 0);
  }
}

// Fills the fragments of slabs [range.begin, range.end), zero beyond. The sums come from the tensor
// cores: a product with ones puts every token's sum where the lane needs it.
template <typename S, DecodeInput kInput>
__device__ __forceinline__ void LoadActivations(const W4DecodeParams& p, const WarpRange& range,
                                                int32_t lane,
                                                const float (&inverse_rms)[S::kTokenTiles],
                                                Fragments<S>* x) {
  constexpr int32_t kGroup = S::kGroup == 0 ? 128 : S::kGroup;
#pragma unroll
  for (int32_t s = 0; s < S::kChunk; ++s) {
#pragma unroll
    for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
      uint4 eights[4];
      LoadSlab<kGroup, kInput>(p, range.begin + s, tile * 8 + lane / 4, lane % 4, inverse_rms[tile],
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
  if constexpr (S::kGroup == 0) return;
  constexpr int32_t kSteps = kGroup / 16;
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
        x->sums[s][group][tile][0] = sum[0];
        x->sums[s][group][tile][1] = sum[1];
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
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float exact = fmaf(i < 2 ? c.bias_low : c.bias_high, x.sums[s][group][tile][i % 2],
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

// Writes one lane's share of a finished tile: rows r, r + 8 of tokens 2c, 2c + 1. Returns what it
// adds to those tokens' sums of squares (kAddResidual).
__device__ __forceinline__ float2 StoreTile(const W4DecodeParams& p, int32_t row_tile,
                                            int32_t token_tile, int32_t lane, const float4& sum) {
  const int32_t row = row_tile * layout::kGpuTileRows + lane / 4;
  float2 squares = make_float2(0, 0);
#pragma unroll
  for (int32_t j = 0; j < 2; ++j) {
    const int32_t token = token_tile * 8 + lane % 4 * 2 + j;
    if (token >= p.tokens) continue;
    float low = j == 0 ? sum.x : sum.y;
    float high = j == 0 ? sum.z : sum.w;
    if (p.output == DecodeOutput::kSiluMul) {
      if (p.bias != nullptr && row + 8 < p.rows) {
        low += __half2float(p.bias[row]);
        high += __half2float(p.bias[row + 8]);
      }
      const int32_t column = row_tile * 8 + lane / 4;
      const float silu = low / (1.0f + __expf(-low));
      if (column < p.rows / 2) {
        p.y_half[static_cast<int64_t>(token) * (p.rows / 2) + column] = __float2half(silu * high);
      }
      continue;
    }
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t r = row + 8 * i;
      if (r >= p.rows) continue;
      float value = i == 0 ? low : high;
      if (p.bias != nullptr) value += __half2float(p.bias[r]);
      const int64_t at = static_cast<int64_t>(token) * p.rows + r;
      if (p.output == DecodeOutput::kHalf) {
        p.y_half[at] = __float2half(value);
      } else if (p.output == DecodeOutput::kFloat) {
        p.y_float[at] = value;
      } else {
        value += p.residual_out[at];
        p.residual_out[at] = value;
        (j == 0 ? squares.x : squares.y) += value * value;
      }
    }
  }
  return squares;
}

// One block's sum of a tile over its warps, in warp order.
template <typename S>
__device__ __forceinline__ void SumWarps(const float4* partial, int32_t lane,
                                         float4 (&sum)[S::kTokenTiles]) {
#pragma unroll
  for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
    sum[tile] = partial[tile * 32 + lane];
#pragma unroll
    for (int32_t warp = 1; warp < kWarps; ++warp) {
      const float4 other = partial[(warp * S::kTokenTiles + tile) * 32 + lane];
      sum[tile].x += other.x;
      sum[tile].y += other.y;
      sum[tile].z += other.z;
      sum[tile].w += other.w;
    }
  }
}

// Stores a finished tile and adds to this warp's sums of squares.
template <typename S>
__device__ __forceinline__ void FinishTile(const W4DecodeParams& p, int32_t row_tile, int32_t lane,
                                           const float4 (&sum)[S::kTokenTiles],
                                           float* square_sums) {
#pragma unroll
  for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
    float2 squares = StoreTile(p, row_tile, tile, lane, sum[tile]);
    if (p.output == DecodeOutput::kAddResidual) {
#pragma unroll
      for (int32_t offset = 4; offset < 32; offset *= 2) {
        squares.x += __shfl_xor_sync(0xffffffffu, squares.x, offset);
        squares.y += __shfl_xor_sync(0xffffffffu, squares.y, offset);
      }
      if (lane < 4) {
        square_sums[tile * 8 + lane * 2] += squares.x;
        square_sums[tile * 8 + lane * 2 + 1] += squares.y;
      }
    }
  }
}

template <typename S>
struct SharedLayout {
  static constexpr int32_t kRing = kWarps * S::kSlots * S::kSlotBytes;
  static constexpr int32_t kTileSum = S::kTokenTiles * 32 * 16;  // one sum of one tile
  static constexpr int32_t kPartial = kWarps * kTileSum;
  static constexpr int32_t kRound = kRing + 2 * kPartial;  // [2][kRoundTiles] block sums
  static constexpr int32_t kBars = kRound + 2 * kRoundTiles * kTileSum;
  static constexpr int32_t kSquares = kBars + kWarps * S::kSlots * 8;
  static constexpr int32_t kBytes = kSquares + kWarps * 16 * 4;  // [warp][token]
};

// A round of tiles whose block sums lie in every block's shared memory: the blocks of the cluster
// meet, then each finishes its part of the tiles, adding in block order.
template <typename S>
__device__ __forceinline__ void FinishRound(const W4DecodeParams& p, uint8_t* round_sums,
                                            int32_t first_tile, int32_t tiles, int32_t lane,
                                            int32_t warp, float* square_sums) {
  ClusterBarrier();
  const int32_t blocks = static_cast<int32_t>(ClusterBlocks());
  const int32_t me = static_cast<int32_t>(ClusterRank());
  for (int32_t index = me + blocks * warp; index < tiles; index += blocks * kWarps) {
    float4 sum[S::kTokenTiles];
#pragma unroll
    for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
      const void* at = round_sums + index * SharedLayout<S>::kTileSum + (tile * 32 + lane) * 16;
      sum[tile] = make_float4(0, 0, 0, 0);
      for (int32_t block = 0; block < blocks; ++block) {
        const float4 other = LoadClusterShared128(at, static_cast<uint32_t>(block));
        sum[tile].x += other.x;
        sum[tile].y += other.y;
        sum[tile].z += other.z;
        sum[tile].w += other.w;
      }
    }
    const int32_t clusters = static_cast<int32_t>(gridDim.x) / blocks;
    const int32_t cluster = static_cast<int32_t>(blockIdx.x) / blocks;
    FinishTile<S>(p, cluster + (first_tile + index) * clusters, lane, sum, square_sums);
  }
}

template <typename S, DecodeInput kInput, bool kCluster>
__global__ void __launch_bounds__(kThreads, 2)
    W4DecodeKernel(const __grid_constant__ W4DecodeParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  using Layout = SharedLayout<S>;
  const int32_t warp = threadIdx.x / 32;
  const int32_t lane = threadIdx.x % 32;
  float4* partials = reinterpret_cast<float4*>(shared + Layout::kRing);
  float* squares = reinterpret_cast<float*>(shared + Layout::kSquares) + warp * 16;

  const int32_t parts = kCluster ? static_cast<int32_t>(ClusterBlocks()) : 1;
  const int32_t part = kCluster ? static_cast<int32_t>(ClusterRank()) : 0;
  const int32_t columns_of_tiles = static_cast<int32_t>(gridDim.x) / parts;
  const int32_t first_tile = static_cast<int32_t>(blockIdx.x) / parts;
  const int32_t slab_count = layout::GpuSlabs(p.columns);
  const int32_t tile_count =
      (layout::GpuRowTiles(p.rows) - first_tile + columns_of_tiles - 1) / columns_of_tiles;
  const WarpRange range = SlabRange(slab_count, part * kWarps + warp, parts * kWarps);

  WeightStream<S> stream;
  stream.ring = shared + warp * S::kSlots * S::kSlotBytes;
  stream.full = reinterpret_cast<uint64_t*>(shared + Layout::kBars) + warp * S::kSlots;
  stream.policy = EvictFirstPolicy();
  stream.next =
      p.slabs + (static_cast<int64_t>(first_tile) * slab_count + range.begin) * S::kSlabBytes;
  stream.tile_stride = static_cast<int64_t>(columns_of_tiles) * slab_count * S::kSlabBytes;
  stream.slabs = range.end - range.begin;
  stream.tiles_left = tile_count;
  // Slabs that a warp lacks are never copied: they must hold finite numbers all the same.
  if (stream.slabs < S::kChunk) {
    for (int32_t i = lane; i < S::kSlots * S::kSlotBytes / 16; i += 32) {
      reinterpret_cast<uint4*>(stream.ring)[i] = make_uint4(0, 0, 0, 0);
    }
    FenceSharedForCopies();
  }
  __syncwarp();
  if (lane == 0) {
    for (int32_t i = 0; i < S::kSlots; ++i) BarrierInit(stream.full + i, 1);
    FenceBarrierInit();
    for (int32_t i = 0; i < S::kSlots; ++i) stream.Issue();
  }
  if (lane < 16) squares[lane] = 0;
  __syncwarp();
  LetNextKernelStart();
  WaitForPreviousKernel();

  float inverse_rms[S::kTokenTiles] = {};
  if constexpr (kInput == DecodeInput::kRmsNorm) LoadInverseRms<S>(p, lane, inverse_rms);
  Fragments<S> x;
  LoadActivations<S, kInput>(p, range, lane, inverse_rms, &x);

  int32_t round = 0;
  for (int32_t tile = 0; tile < tile_count; ++tile) {
    float acc[S::kTokenTiles][4] = {};
    MultiplyTile<S>(&stream, lane, x, acc);
    float4* partial = partials + tile % 2 * (Layout::kPartial / 16);
#pragma unroll
    for (int32_t t = 0; t < S::kTokenTiles; ++t) {
      partial[(warp * S::kTokenTiles + t) * 32 + lane] =
          make_float4(acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
    }
    __syncthreads();
    const int32_t in_round = tile % kRoundTiles;
    uint8_t* round_sums = shared + Layout::kRound + round % 2 * kRoundTiles * Layout::kTileSum;
    if (tile % kWarps == warp) {
      float4 sum[S::kTokenTiles];
      SumWarps<S>(partial, lane, sum);
      if constexpr (kCluster) {
#pragma unroll
        for (int32_t t = 0; t < S::kTokenTiles; ++t) {
          reinterpret_cast<float4*>(round_sums + in_round * Layout::kTileSum)[t * 32 + lane] =
              sum[t];
        }
      } else {
        FinishTile<S>(p, first_tile + tile * columns_of_tiles, lane, sum, squares);
      }
    }
    if constexpr (kCluster) {
      if (in_round == kRoundTiles - 1 || tile == tile_count - 1) {
        FinishRound<S>(p, round_sums, tile - in_round, in_round + 1, lane, warp, squares);
        ++round;
      }
    }
  }
  if (p.output == DecodeOutput::kAddResidual) {
    __syncthreads();
    if (threadIdx.x < p.tokens) {
      const float* all = reinterpret_cast<const float*>(shared + Layout::kSquares);
      float sum = 0;
      for (int32_t w = 0; w < kWarps; ++w) sum += all[w * 16 + threadIdx.x];
      p.square_sums_out[threadIdx.x * gridDim.x + blockIdx.x] = sum;
    }
  }
  // A block's shared memory must outlive its readers.
  if constexpr (kCluster) ClusterBarrier();
}

template <typename S, DecodeInput kInput, bool kCluster>
cudaError_t LaunchInput(const W4DecodeParams& params, const DecodeGrid& grid, cudaStream_t stream) {
  constexpr int32_t kBytes = SharedLayout<S>::kBytes;
  const auto kernel = W4DecodeKernel<S, kInput, kCluster>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<uint32_t>(grid.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[3] = {};
  if (params.dependent_launch) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if constexpr (kCluster) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = static_cast<uint32_t>(grid.cluster_blocks);
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
    // Two blocks fit on a multiprocessor; a cluster must not take half of them.
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
    attributes[config.numAttrs++].val.clusterSchedulingPolicyPreference =
        cudaClusterSchedulingPolicySpread;
  }
  config.attrs = attributes;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <int32_t kGroup, int32_t kTokenTiles, DecodeInput kInput>
cudaError_t LaunchCluster(const W4DecodeParams& params, const DecodeGrid& grid,
                          cudaStream_t stream) {
  using S = Shape<kGroup, kTokenTiles>;
  if (grid.cluster_blocks > 1) return LaunchInput<S, kInput, true>(params, grid, stream);
  return LaunchInput<S, kInput, false>(params, grid, stream);
}

template <int32_t kGroup, int32_t kTokenTiles>
cudaError_t LaunchTokens(const W4DecodeParams& params, const DecodeGrid& grid,
                         cudaStream_t stream) {
  if (params.input == DecodeInput::kHalf) {
    return LaunchCluster<kGroup, kTokenTiles, DecodeInput::kHalf>(params, grid, stream);
  }
  return LaunchCluster<kGroup, kTokenTiles, DecodeInput::kRmsNorm>(params, grid, stream);
}

template <int32_t kGroup>
cudaError_t Launch(const W4DecodeParams& params, const DecodeGrid& grid, cudaStream_t stream) {
  if (params.tokens <= 8) return LaunchTokens<kGroup, 1>(params, grid, stream);
  return LaunchTokens<kGroup, 2>(params, grid, stream);
}

}  // namespace

DecodeGrid W4DecodeGrid(int32_t rows, int32_t columns, int32_t tokens, int32_t multiprocessors) {
  const int32_t slabs_of_block = kWarps * (tokens <= 8 ? 4 : 2);
  DecodeGrid grid;
  while (grid.cluster_blocks * slabs_of_block < layout::GpuSlabs(columns)) {
    grid.cluster_blocks *= 2;
  }
  // Multiprocessors come in clusters of 16 or 18: some stay out of large clusters.
  const int32_t usable = grid.cluster_blocks <= 2 ? multiprocessors : multiprocessors / 8 * 8;
  const int32_t tiles = layout::GpuRowTiles(rows);
  const int32_t clusters = usable / grid.cluster_blocks;
  grid.blocks = (tiles < clusters ? tiles : clusters) * grid.cluster_blocks;
  return grid;
}

int64_t W4DecodeBytes(int32_t rows, int32_t columns, int32_t group) {
  if (group != 0) return layout::GpuW4Bytes(rows, columns, group);
  return static_cast<int64_t>(layout::GpuRowTiles(rows)) * layout::GpuSlabs(columns) *
         kDenseSlabBytes;
}

cudaError_t W4Decode(const W4DecodeParams& params, int32_t multiprocessors, cudaStream_t stream) {
  if (params.tokens < 1 || params.tokens > 16 || params.columns % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  const DecodeGrid grid = W4DecodeGrid(params.rows, params.columns, params.tokens, multiprocessors);
  if (grid.cluster_blocks > 8) return cudaErrorInvalidValue;
  switch (params.group) {
    case 0:
      return Launch<0>(params, grid, stream);
    case 32:
      return Launch<32>(params, grid, stream);
    case 64:
      return Launch<64>(params, grid, stream);
    case 128:
      return Launch<128>(params, grid, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nibble::cuda
