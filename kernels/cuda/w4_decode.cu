#include "kernels/cuda/w4_decode.h"

#include "kernels/cuda/launch.cuh"
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

// What a kernel instance is compiled for. A warp's range of k is at most kChunk slabs: its
// activations stay in registers for the whole launch.
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

// A warp's part of a token's sum of squares, all loads in flight at once.
__device__ __forceinline__ float LoadSquares(const NormedInput& normed, int32_t token,
                                             int32_t lane) {
  const float* parts = normed.square_sums + static_cast<int64_t>(token) * normed.parts;
  float sum = 0;
#pragma unroll 8
  for (int32_t i = lane; i < normed.parts; i += 32) sum += parts[i];
  return sum;
}

// Every warp sees to its tokens: what the results of a normed input are multiplied by.
struct TokenFactors {
  float squares[2];
  float scale[2];

  __device__ __forceinline__ void Load(const W4DecodeParams& p, int32_t warp, int32_t lane) {
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t token = warp + i * kWarps;
      if (token >= p.tokens) continue;
      squares[i] = LoadSquares(p.normed, token, lane);
      scale[i] = p.normed.scale[token];
    }
  }
  __device__ __forceinline__ void Store(const W4DecodeParams& p, int32_t warp, int32_t lane,
                                        float* factors) const {
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t token = warp + i * kWarps;
      if (token >= p.tokens) continue;
      float sum = squares[i];
#pragma unroll
      for (int32_t offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      }
      const float inverse = rsqrtf(sum / static_cast<float>(p.columns) + p.normed.epsilon);
      if (lane != 0) continue;
      factors[token] = inverse / (scale[i] * kNormedInputFactor);
      if (blockIdx.x == 0) p.normed.inverse_rms_out[token] = inverse;
    }
  }
};

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

// What the lane that finishes a tile needs beside the sums: old residuals and norm weights of its
// rows r, r + 8, asked for while the tile is still being multiplied.
template <typename S>
struct Finish {
  float old[S::kTokenTiles][4];
  float weight[2];

  __device__ __forceinline__ void Prefetch(const W4DecodeParams& p, int32_t row_tile,
                                           int32_t lane) {
    if (p.output != DecodeOutput::kAddResidual) return;
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t row = row_tile * layout::kGpuTileRows + lane / 4 + 8 * i;
      const bool exists = row < p.rows;
      weight[i] = exists && p.next.x != nullptr ? __half2float(p.next.norm_weight[row]) : 0;
#pragma unroll
      for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
#pragma unroll
        for (int32_t j = 0; j < 2; ++j) {
          const int64_t token = tile * 8 + lane % 4 * 2 + j;
          old[tile][2 * i + j] =
              exists && token < p.tokens ? p.residual_out[token * p.rows + row] : 0;
        }
      }
    }
  }
};

// One value of a finished row and token. Returns its square where the next norm asks for it.
__device__ __forceinline__ float StoreValue(const W4DecodeParams& p, int64_t token, int32_t row,
                                            float value, float old, float weight, float scale) {
  const int64_t at = token * p.rows + row;
  if (p.output == DecodeOutput::kHalf) {
    p.y_half[at] = __float2half(value);
    return 0;
  }
  if (p.output == DecodeOutput::kFloat) {
    p.y_float[at] = value;
    return 0;
  }
  value += old;
  p.residual_out[at] = value;
  if (p.next.x != nullptr) p.next.x[at] = __float2half(value * weight * scale);
  return value * value;
}

// Writes one lane's share of a finished tile: rows r, r + 8 of tokens 2c, 2c + 1 of every token
// tile, and the tile's sums of squares.
template <typename S>
__device__ __forceinline__ void StoreTile(const W4DecodeParams& p, int32_t row_tile, int32_t lane,
                                          const float4 (&sums)[S::kTokenTiles],
                                          const Finish<S>& finish, const float* factors,
                                          const float* scales) {
  const int32_t row = row_tile * layout::kGpuTileRows + lane / 4;
  const bool has_bias = p.bias != nullptr;
  const float bias[2] = {has_bias && row < p.rows ? __half2float(p.bias[row]) : 0.0f,
                         has_bias && row + 8 < p.rows ? __half2float(p.bias[row + 8]) : 0.0f};
#pragma unroll
  for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
    const float values[4] = {sums[tile].x, sums[tile].y, sums[tile].z, sums[tile].w};
    float squares[2] = {};
#pragma unroll
    for (int32_t j = 0; j < 2; ++j) {
      const int32_t token = tile * 8 + lane % 4 * 2 + j;
      if (token >= p.tokens) continue;
      const float low = values[j] * factors[token] + bias[0];
      const float high = values[2 + j] * factors[token] + bias[1];
      if (p.output == DecodeOutput::kSiluMul) {
        const int32_t column = row_tile * 8 + lane / 4;
        const float silu = low / (1.0f + __expf(-low));
        if (column < p.rows / 2) {
          p.y_half[static_cast<int64_t>(token) * (p.rows / 2) + column] = __float2half(silu * high);
        }
        continue;
      }
      if (row < p.rows) {
        squares[j] +=
            StoreValue(p, token, row, low, finish.old[tile][j], finish.weight[0], scales[token]);
      }
      if (row + 8 < p.rows) {
        squares[j] += StoreValue(p, token, row + 8, high, finish.old[tile][2 + j], finish.weight[1],
                                 scales[token]);
      }
    }
    if (p.output != DecodeOutput::kAddResidual || p.next.x == nullptr) continue;
#pragma unroll
    for (int32_t j = 0; j < 2; ++j) {
#pragma unroll
      for (int32_t offset = 4; offset < 32; offset *= 2) {
        squares[j] += __shfl_xor_sync(0xffffffffu, squares[j], offset);
      }
      const int32_t token = tile * 8 + lane * 2 + j;
      if (lane < 4 && token < p.tokens) {
        p.next.square_sums[token * layout::GpuRowTiles(p.rows) + row_tile] = squares[j];
      }
    }
  }
}

__device__ __forceinline__ void AddTo(float4* sum, const float4& other) {
  sum->x += other.x;
  sum->y += other.y;
  sum->z += other.z;
  sum->w += other.w;
}

// Partial sums of row tiles in shared memory: every warp arrives with its own, the tile's finisher
// adds them up in warp order and hands the buffer back.
template <typename S>
struct Partials {
  static constexpr int32_t kBuffers = 2;
  static constexpr int32_t kBytes = kWarps * S::kTokenTiles * 32 * 16;  // of one buffer

  float4* data;
  uint64_t* full;  // [kBuffers], kWarps arrivals
  uint64_t* free;  // [kBuffers], one arrival

  __device__ __forceinline__ float4* Buffer(int32_t tile) const {
    return data + tile % kBuffers * (kBytes / 16);
  }
  __device__ __forceinline__ void Put(int32_t tile, int32_t warp, int32_t lane,
                                      const float (&acc)[S::kTokenTiles][4]) const {
    const int32_t buffer = tile % kBuffers, use = tile / kBuffers;
    if (use > 0) BarrierWait(free + buffer, (use - 1) & 1);
#pragma unroll
    for (int32_t t = 0; t < S::kTokenTiles; ++t) {
      Buffer(tile)[(warp * S::kTokenTiles + t) * 32 + lane] =
          make_float4(acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
    }
    __syncwarp();
    if (lane == 0) BarrierArrive(full + buffer);
  }
  __device__ __forceinline__ void Take(int32_t tile, int32_t lane,
                                       float4 (&sum)[S::kTokenTiles]) const {
    const int32_t buffer = tile % kBuffers, use = tile / kBuffers;
    BarrierWait(full + buffer, use & 1);
#pragma unroll
    for (int32_t t = 0; t < S::kTokenTiles; ++t) {
      sum[t] = Buffer(tile)[t * 32 + lane];
#pragma unroll
      for (int32_t warp = 1; warp < kWarps; ++warp) {
        AddTo(&sum[t], Buffer(tile)[(warp * S::kTokenTiles + t) * 32 + lane]);
      }
    }
    __syncwarp();
    if (lane == 0) BarrierArrive(free + buffer);
  }
};

template <typename S>
struct SharedLayout {
  static constexpr int32_t kRing = kWarps * S::kSlots * S::kSlotBytes;
  static constexpr int32_t kPartials = kRing;
  static constexpr int32_t kBars = kPartials + Partials<S>::kBuffers * Partials<S>::kBytes;
  static constexpr int32_t kMeetings = kBars + kWarps * S::kSlots * 8;
  static constexpr int32_t kFactors = kMeetings + 2 * Partials<S>::kBuffers * 8;
  static constexpr int32_t kScales = kFactors + 16 * 4;
  static constexpr int32_t kSums = kScales + 16 * 4;
  static constexpr int32_t kBytes = kSums + kWarps * Fragments<S>::kSumBytes;
};

// Where this block stands in a grid that may split rows.
struct Place {
  int32_t part, parts;
  int32_t first_tile, tile_stride, tile_count;
  __device__ __forceinline__ int32_t RowTile(int32_t tile) const {
    return first_tile + tile * tile_stride;
  }
};
__device__ __forceinline__ Place MakePlace(const W4DecodeParams& p, int32_t parts) {
  Place place;
  place.parts = parts;
  place.part = static_cast<int32_t>(blockIdx.x) % parts;
  place.tile_stride = static_cast<int32_t>(gridDim.x) / parts;
  place.first_tile = static_cast<int32_t>(blockIdx.x) / parts;
  place.tile_count =
      (layout::GpuRowTiles(p.rows) - place.first_tile + place.tile_stride - 1) / place.tile_stride;
  return place;
}

// The parts of this warp's tiles are all on their way: whoever comes last to a tile adds its parts
// up, in their order. One trip for all arrivals: lane i counts the warp's tile i.
template <typename S>
__device__ void FinishSplit(const W4DecodeParams& p, const Place& place, int32_t warp, int32_t lane,
                            const float* factors, const float* scales) {
  const int32_t mine = (place.tile_count - warp + kWarps - 1) / kWarps;
  for (int32_t first = 0; first < mine; first += 32) {
    __threadfence();
    __syncwarp();
    bool last = false;
    if (first + lane < mine) {
      int32_t* arrivals = p.split_arrivals + place.RowTile(warp + (first + lane) * kWarps);
      last = atomicAdd(arrivals, 1) == place.parts - 1;
      if (last) *arrivals = 0;
    }
    uint32_t lasts = __ballot_sync(0xffffffffu, last);
    __threadfence();
    for (; lasts != 0; lasts &= lasts - 1) {
      const int32_t row_tile = place.RowTile(warp + (first + __ffs(lasts) - 1) * kWarps);
      Finish<S> finish;
      finish.Prefetch(p, row_tile, lane);
      const float4* from =
          p.split_sums + static_cast<int64_t>(row_tile) * place.parts * S::kTokenTiles * 32 + lane;
      float4 sum[S::kTokenTiles] = {};
      for (int32_t part = 0; part < place.parts; ++part) {
#pragma unroll
        for (int32_t t = 0; t < S::kTokenTiles; ++t) {
          AddTo(&sum[t], __ldcg(from + (part * S::kTokenTiles + t) * 32));
        }
      }
      StoreTile<S>(p, row_tile, lane, sum, finish, factors, scales);
    }
  }
}

template <typename S>
__device__ __forceinline__ void InitStream(const W4DecodeParams& p, const Place& place,
                                           const WarpRange& range, uint8_t* shared, int32_t warp,
                                           int32_t lane, WeightStream<S>* stream) {
  using Layout = SharedLayout<S>;
  const int32_t slabs = layout::GpuSlabs(p.columns);
  stream->ring = shared + warp * S::kSlots * S::kSlotBytes;
  stream->full = reinterpret_cast<uint64_t*>(shared + Layout::kBars) + warp * S::kSlots;
  stream->policy = EvictFirstPolicy();
  stream->next =
      p.slabs + (static_cast<int64_t>(place.first_tile) * slabs + range.begin) * S::kSlabBytes;
  stream->tile_stride = static_cast<int64_t>(place.tile_stride) * slabs * S::kSlabBytes;
  stream->slabs = range.end - range.begin;
  stream->tiles_left = place.tile_count;
  // Slabs that a warp lacks are never copied: they must hold finite numbers all the same.
  if (stream->slabs < S::kChunk) {
    for (int32_t i = lane; i < S::kSlots * S::kSlotBytes / 16; i += 32) {
      reinterpret_cast<uint4*>(stream->ring)[i] = make_uint4(0, 0, 0, 0);
    }
    FenceSharedForCopies();
  }
  __syncwarp();
  if (lane == 0) {
    for (int32_t i = 0; i < S::kSlots; ++i) BarrierInit(stream->full + i, 1);
    FenceBarrierInit();
    for (int32_t i = 0; i < S::kSlots; ++i) stream->Issue();
  }
}

// What results are multiplied by, and what the next input is: of every token, in shared memory.
template <typename S>
__device__ __forceinline__ void LoadInputs(const W4DecodeParams& p, const WarpRange& range,
                                           int32_t warp, int32_t lane, Fragments<S>* x,
                                           float* factors, float* scales) {
  TokenFactors token_factors;
  const bool normed = p.normed.scale != nullptr;
  if (normed) token_factors.Load(p, warp, lane);
  float next_scale = 0;
  if (warp == 0 && lane < p.tokens && p.next.x != nullptr) next_scale = p.next.scale[lane];
  LoadActivations<S>(p, range, lane, x);
  if (normed) {
    token_factors.Store(p, warp, lane, factors);
  } else if (warp == 0 && lane < 16) {
    factors[lane] = 1;
  }
  if (warp == 0 && lane < 16) scales[lane] = next_scale * kNormedInputFactor;
  SumGroups<S>(lane, x);
  __syncwarp();
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 2)
    W4DecodeKernel(const __grid_constant__ W4DecodeParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  using Layout = SharedLayout<S>;
  const int32_t warp = threadIdx.x / 32;
  const int32_t lane = threadIdx.x % 32;
  const int32_t slab_count = layout::GpuSlabs(p.columns);
  const Place place = MakePlace(p, (slab_count + kWarps * S::kChunk - 1) / (kWarps * S::kChunk));
  const WarpRange range = SlabRange(slab_count, place.part * kWarps + warp, place.parts * kWarps);
  float* factors = reinterpret_cast<float*>(shared + Layout::kFactors);
  float* scales = reinterpret_cast<float*>(shared + Layout::kScales);
  Partials<S> partials{
      reinterpret_cast<float4*>(shared + Layout::kPartials),
      reinterpret_cast<uint64_t*>(shared + Layout::kMeetings),
      reinterpret_cast<uint64_t*>(shared + Layout::kMeetings) + Partials<S>::kBuffers};
  WeightStream<S> stream;
  InitStream<S>(p, place, range, shared, warp, lane, &stream);
  if (threadIdx.x == 0) {
    for (int32_t i = 0; i < Partials<S>::kBuffers; ++i) {
      BarrierInit(partials.full + i, kWarps);
      BarrierInit(partials.free + i, 1);
    }
  }
  __syncthreads();
  LetNextKernelStart();
  WaitForPreviousKernel();

  Fragments<S> x;
  x.sums = reinterpret_cast<float*>(shared + Layout::kSums + warp * Fragments<S>::kSumBytes);
  LoadInputs<S>(p, range, warp, lane, &x, factors, scales);
  for (int32_t tile = 0; tile < place.tile_count; ++tile) {
    const bool finisher = tile % kWarps == warp;
    Finish<S> finish;
    if (finisher && place.parts == 1) finish.Prefetch(p, place.RowTile(tile), lane);
    float acc[S::kTokenTiles][4] = {};
    MultiplyTile<S>(&stream, lane, x, acc);
    partials.Put(tile, warp, lane, acc);
    if (!finisher) continue;
    float4 sum[S::kTokenTiles];
    partials.Take(tile, lane, sum);
    if (place.parts == 1) {
      StoreTile<S>(p, place.RowTile(tile), lane, sum, finish, factors, scales);
      continue;
    }
    float4* to = p.split_sums +
                 (static_cast<int64_t>(place.RowTile(tile)) * place.parts + place.part) *
                     S::kTokenTiles * 32 +
                 lane;
#pragma unroll
    for (int32_t t = 0; t < S::kTokenTiles; ++t) to[t * 32] = sum[t];
  }
  if (place.parts > 1) FinishSplit<S>(p, place, warp, lane, factors, scales);
}

template <typename S>
cudaError_t LaunchShapeOf(const W4DecodeParams& params, const DecodeGrid& grid,
                          cudaStream_t stream) {
  constexpr int32_t kBytes = SharedLayout<S>::kBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(W4DecodeKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  return LaunchKernel(W4DecodeKernel<S>,
                      {.grid = dim3(static_cast<uint32_t>(grid.blocks)),
                       .block = dim3(kThreads),
                       .shared_bytes = kBytes,
                       .stream = stream,
                       .dependent = params.dependent_launch},
                      params);
}

template <int32_t kGroup>
cudaError_t Launch(const W4DecodeParams& params, const DecodeGrid& grid, cudaStream_t stream) {
  if (params.tokens <= 8) return LaunchShapeOf<Shape<kGroup, 1>>(params, grid, stream);
  return LaunchShapeOf<Shape<kGroup, 2>>(params, grid, stream);
}

}  // namespace

DecodeGrid W4DecodeGrid(int32_t rows, int32_t columns, int32_t tokens, int32_t multiprocessors) {
  const int32_t slabs_of_block = kWarps * (tokens <= 8 ? 4 : 2);
  DecodeGrid grid;
  grid.parts = (layout::GpuSlabs(columns) + slabs_of_block - 1) / slabs_of_block;
  const int32_t tiles = layout::GpuRowTiles(rows);
  const int32_t columns_of_tiles =
      multiprocessors / grid.parts > 0 ? multiprocessors / grid.parts : 1;
  grid.blocks = (tiles < columns_of_tiles ? tiles : columns_of_tiles) * grid.parts;
  return grid;
}

int64_t W4DecodeSplitBytes(int32_t rows, int32_t columns, int32_t tokens) {
  const DecodeGrid grid = W4DecodeGrid(rows, columns, tokens, 1);
  if (grid.parts == 1) return 0;
  return static_cast<int64_t>(layout::GpuRowTiles(rows)) * grid.parts * (tokens <= 8 ? 1 : 2) * 32 *
         static_cast<int64_t>(sizeof(float4));
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
  if (grid.parts > 1 && (params.split_sums == nullptr || params.split_arrivals == nullptr)) {
    return cudaErrorInvalidValue;
  }
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
