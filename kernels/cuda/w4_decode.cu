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
constexpr int32_t kPassTiles = 4;          // tiles summed at once where k is streamed

// What a kernel instance is compiled for.
template <int32_t kGroupT, int32_t kTokenTilesT, int32_t kChunkT, bool kResidentT>
struct Shape {
  static constexpr int32_t kGroup = kGroupT;            // 0 = dense fp16
  static constexpr int32_t kTokenTiles = kTokenTilesT;  // 8 tokens each
  static constexpr int32_t kChunk = kChunkT;            // slabs of x held in registers
  // Resident: a warp's whole range of k is one chunk; else chunks are streamed, double-buffered.
  static constexpr bool kResident = kResidentT;
  static constexpr int32_t kSlabBytes = kGroup == 0 ? kDenseSlabBytes : GpuSlabBytes(kGroup);
  static constexpr int32_t kCopySlabs = kGroup == 0 ? 1 : kChunk;
  static constexpr int32_t kSlotBytes = kCopySlabs * kSlabBytes;
  static constexpr int32_t kSlots =
      kRingBytes / kSlotBytes < 3 ? 3 : (kRingBytes / kSlotBytes > 8 ? 8 : kRingBytes / kSlotBytes);
  static constexpr int32_t kCopies = kChunk / kCopySlabs;  // of one tile and chunk
  static constexpr int32_t kPass = kResident ? 1 : kPassTiles;
};

// Activations of one chunk: [slab][k-step][token tile] B fragments.
template <typename S>
struct Fragments {
  uint32_t b[S::kChunk][8][S::kTokenTiles][2];
};

struct WarpRange {
  int32_t begin;
  int32_t end;
};
__device__ __forceinline__ WarpRange SlabRange(int32_t slabs, int32_t warp) {
  return {slabs * warp / kWarps, slabs * (warp + 1) / kWarps};
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

// One lane's 32 activations of a slab and token, from column k on in runs of eight. All loads go out
// before the first is used: a load that waits for the one before it costs a trip to the L2.
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
      const float2 w0 = __half22float2(w[0]), w1 = __half22float2(w[1]),
                   w2 = __half22float2(w[2]), w3 = __half22float2(w[3]);
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

// Fragments of slabs [first_slab, first_slab + chunk), zero beyond `end_slab`.
template <typename S, DecodeInput kInput>
__device__ __forceinline__ void LoadChunk(const W4DecodeParams& p, int32_t first_slab,
                                          int32_t end_slab, int32_t lane,
                                          const float (&inverse_rms)[S::kTokenTiles],
                                          Fragments<S>* x) {
  constexpr int32_t kGroup = S::kGroup == 0 ? 128 : S::kGroup;
#pragma unroll
  for (int32_t s = 0; s < S::kChunk; ++s) {
#pragma unroll
    for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
      uint4 eights[4];
      LoadSlab<kGroup, kInput>(p, first_slab + s, tile * 8 + lane / 4, lane % 4,
                               inverse_rms[tile], first_slab + s < end_slab, eights);
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

// Dequantizes one word of nibbles to an A fragment: exact (q - z) in fp16.
__device__ __forceinline__ void Dequantize(uint32_t w, uint32_t minus_low, uint32_t minus_high,
                                           uint32_t (&a)[4]) {
  a[0] = AddHalf2(AndOr<0x000f000f>(w, 0x64006400u), minus_low);
  a[1] = FmaHalf2(AndOr<0x00f000f0>(w, 0x64006400u), 0x2c002c00u, minus_high);
  a[2] = AddHalf2(AndOr<0x000f000f>(w >> 8, 0x64006400u), minus_low);
  a[3] = FmaHalf2(AndOr<0x00f000f0>(w >> 8, 0x64006400u), 0x2c002c00u, minus_high);
}

struct GroupConstants {
  float scale_low, scale_high;      // of rows r and r + 8
  uint32_t minus_low, minus_high;   // -(1024 + z), -(64 + z) as fp16 pairs
};
__device__ __forceinline__ GroupConstants LoadConstants(const uint8_t* slab, int32_t group,
                                                        int32_t lane) {
  const uint8_t* constants = slab + kGpuSlabNibbleBytes + group * layout::kGpuGroupBytes;
  const half2 scales = *reinterpret_cast<const half2*>(constants + lane / 4 * 4);
  const uint32_t zeros = *reinterpret_cast<const uint16_t*>(constants + 32 + lane / 4 * 2);
  return {__low2float(scales), __high2float(scales),
          (zeros & 0xff) * 0x00010001u | 0xe400e400u,
          (zeros >> 8) * 0x00100010u | 0xd400d400u};
}

// acc += W x over the first `count` slabs of a copy. The slabs' products interleave: a chain of
// dependent tensor-core instructions would wait for each one's latency. fp32 sums, one scale a
// group.
template <typename S>
__device__ __forceinline__ void MultiplyW4(const uint8_t* data, int32_t count, int32_t lane,
                                           const Fragments<S>& x,
                                           float (&acc)[S::kTokenTiles][4]) {
  constexpr int32_t kSteps = S::kGroup / 16;
  constexpr int32_t kStepsAtOnce = kSteps < 4 ? kSteps : 4;
  float part[S::kChunk][S::kTokenTiles][4] = {};
  GroupConstants constants[S::kChunk];
#pragma unroll
  for (int32_t first = 0; first < 8; first += kStepsAtOnce) {
    uint32_t words[S::kChunk][kStepsAtOnce];
#pragma unroll
    for (int32_t s = 0; s < S::kChunk; ++s) {
      const uint8_t* slab = data + (s < count ? s : 0) * S::kSlabBytes;
      const uint8_t* at = slab + first / 4 * 512 + lane * 16 + first % 4 * 4;
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
      if (first % kSteps == 0) constants[s] = LoadConstants(slab, first / kSteps, lane);
    }
#pragma unroll
    for (int32_t step = 0; step < kStepsAtOnce; ++step) {
#pragma unroll
      for (int32_t s = 0; s < S::kChunk; ++s) {
        uint32_t a[4];
        Dequantize(words[s][step], constants[s].minus_low, constants[s].minus_high, a);
#pragma unroll
        for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
          MmaF16(part[s][tile], a, x.b[s][first + step][tile][0], x.b[s][first + step][tile][1]);
        }
      }
    }
    if ((first + kStepsAtOnce) % kSteps != 0) continue;
#pragma unroll
    for (int32_t s = 0; s < S::kChunk; ++s) {
#pragma unroll
      for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
          const float scale = i < 2 ? constants[s].scale_low : constants[s].scale_high;
          acc[tile][i] = fmaf(s < count ? scale : 0.0f, part[s][tile][i], acc[tile][i]);
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

// The order in which a warp reads its weights: passes of tiles, in each the chunks of its k range,
// in each the tiles of the pass, in each the copies.
template <typename S>
struct Cursor {
  int32_t tile_count, chunk_count;
  int32_t pass = 0, chunk = 0, tile = 0, copy = 0;

  __device__ __forceinline__ bool done() const { return pass >= tile_count; }
  __device__ __forceinline__ void Next() {
    if (++copy < S::kCopies) return;
    copy = 0;
    if (++tile < min(S::kPass, tile_count - pass)) return;
    tile = 0;
    if (++chunk < chunk_count) return;
    chunk = 0;
    pass += S::kPass;
  }
};

// One warp's stream of weights through its ring of shared memory.
template <typename S>
struct WeightStream {
  uint8_t* ring;
  uint64_t* full;
  const uint8_t* slabs;
  int32_t slab_count;  // of a row tile
  WarpRange range;
  uint64_t policy;
  Cursor<S> ahead;
  int32_t slot = 0;
  uint32_t phase = 0;
  int32_t ahead_slot = 0;

  // Lane 0: starts the copy the cursor stands at, empty ranges included (they complete at once).
  __device__ __forceinline__ void Issue() {
    if (ahead.done()) return;
    const int32_t row_tile = blockIdx.x + (ahead.pass + ahead.tile) * gridDim.x;
    const int32_t first = range.begin + ahead.chunk * S::kChunk + ahead.copy * S::kCopySlabs;
    const int32_t count = min(S::kCopySlabs, range.end - first);
    if (count > 0) {
      const int32_t bytes = count * S::kSlabBytes;
      BarrierExpect(full + ahead_slot, bytes);
      BulkCopy(ring + ahead_slot * S::kSlotBytes,
               slabs + (static_cast<int64_t>(row_tile) * slab_count + first) * S::kSlabBytes,
               bytes, full + ahead_slot, policy);
    } else {
      BarrierExpect(full + ahead_slot, 0);
    }
    if (++ahead_slot == S::kSlots) ahead_slot = 0;
    ahead.Next();
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

// One tile and chunk: acc += W x.
template <typename S>
__device__ __forceinline__ void MultiplyTile(WeightStream<S>* stream, int32_t slabs_here,
                                             int32_t lane, const Fragments<S>& x,
                                             float (&acc)[S::kTokenTiles][4]) {
  if constexpr (S::kGroup == 0) {
#pragma unroll
    for (int32_t copy = 0; copy < S::kCopies; ++copy) {
      const uint8_t* data = stream->Acquire();
      if (copy < slabs_here) MultiplyDense<S>(data, lane, x.b[copy], acc);
      stream->Release(lane);
    }
  } else {
    const uint8_t* data = stream->Acquire();
    if (slabs_here > 0) MultiplyW4<S>(data, slabs_here, lane, x, acc);
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

// Sums the warps' partial tiles in warp order and stores the result.
template <typename S>
__device__ __forceinline__ void ReduceTile(const W4DecodeParams& p, const float4* partial,
                                           int32_t row_tile, int32_t lane, float* square_sums) {
#pragma unroll
  for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
    float4 sum = partial[tile * 32 + lane];
#pragma unroll
    for (int32_t warp = 1; warp < kWarps; ++warp) {
      const float4 other = partial[(warp * S::kTokenTiles + tile) * 32 + lane];
      sum.x += other.x;
      sum.y += other.y;
      sum.z += other.z;
      sum.w += other.w;
    }
    float2 squares = StoreTile(p, row_tile, tile, lane, sum);
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
  static constexpr int32_t kPartial = kWarps * S::kTokenTiles * 32 * 16;  // of one tile
  static constexpr int32_t kBars = kRing + 2 * kPartial;
  static constexpr int32_t kSquares = kBars + kWarps * S::kSlots * 8;
  static constexpr int32_t kBytes = kSquares + kWarps * 16 * 4;  // [warp][token]
};

template <typename S, DecodeInput kInput>
__global__ void __launch_bounds__(kThreads, 2)
    W4DecodeKernel(const __grid_constant__ W4DecodeParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int32_t warp = threadIdx.x / 32;
  const int32_t lane = threadIdx.x % 32;
  using Layout = SharedLayout<S>;
  float4* partials = reinterpret_cast<float4*>(shared + Layout::kRing);
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + Layout::kBars) + warp * S::kSlots;
  float* squares = reinterpret_cast<float*>(shared + Layout::kSquares) + warp * 16;

  const int32_t row_tiles = layout::GpuRowTiles(p.rows);
  const int32_t slab_count = layout::GpuSlabs(p.columns);
  const int32_t tile_count =
      (row_tiles - static_cast<int32_t>(blockIdx.x) + static_cast<int32_t>(gridDim.x) - 1) /
      static_cast<int32_t>(gridDim.x);
  const WarpRange range = SlabRange(slab_count, warp);
  const int32_t chunk_count =
      S::kResident ? 1 : max(1, (range.end - range.begin + S::kChunk - 1) / S::kChunk);

  WeightStream<S> stream;
  stream.ring = shared + warp * S::kSlots * S::kSlotBytes;
  stream.full = full;
  stream.slabs = p.slabs;
  stream.slab_count = slab_count;
  stream.range = range;
  stream.policy = EvictFirstPolicy();
  stream.ahead.tile_count = tile_count;
  stream.ahead.chunk_count = chunk_count;
  if (lane == 0) {
    for (int32_t i = 0; i < S::kSlots; ++i) BarrierInit(full + i, 1);
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
  if constexpr (S::kResident) {
    LoadChunk<S, kInput>(p, range.begin, range.end, lane, inverse_rms, &x);
  }
  int32_t buffer = 0;
  for (int32_t pass = 0; pass < tile_count; pass += S::kPass) {
    float acc[S::kPass][S::kTokenTiles][4] = {};
    if constexpr (!S::kResident) LoadChunk<S, kInput>(p, range.begin, range.end, lane, inverse_rms, &x);
    for (int32_t chunk = 0; chunk < chunk_count; ++chunk) {
      const int32_t first = range.begin + chunk * S::kChunk;
      Fragments<S> next;
      if constexpr (!S::kResident) {
        LoadChunk<S, kInput>(p, first + S::kChunk, range.end, lane, inverse_rms, &next);
      }
#pragma unroll
      for (int32_t tile = 0; tile < S::kPass; ++tile) {
        if (pass + tile < tile_count) {
          MultiplyTile<S>(&stream, range.end - first, lane, x, acc[tile]);
        }
      }
      if constexpr (!S::kResident) x = next;
    }
#pragma unroll
    for (int32_t tile = 0; tile < S::kPass; ++tile) {
      const int32_t index = pass + tile;
      if (index >= tile_count) break;
      float4* partial = partials + buffer * (Layout::kPartial / 16);
#pragma unroll
      for (int32_t t = 0; t < S::kTokenTiles; ++t) {
        partial[(warp * S::kTokenTiles + t) * 32 + lane] =
            make_float4(acc[tile][t][0], acc[tile][t][1], acc[tile][t][2], acc[tile][t][3]);
      }
      __syncthreads();
      if (index % kWarps == warp) {
        ReduceTile<S>(p, partial, blockIdx.x + index * gridDim.x, lane, squares);
      }
      buffer ^= 1;
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
}

template <typename S, DecodeInput kInput>
cudaError_t LaunchInput(const W4DecodeParams& params, int32_t blocks, cudaStream_t stream) {
  constexpr int32_t kBytes = SharedLayout<S>::kBytes;
  cudaError_t error = cudaFuncSetAttribute(W4DecodeKernel<S, kInput>,
                                           cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<uint32_t>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = params.dependent_launch ? 1 : 0;
  return cudaLaunchKernelEx(&config, W4DecodeKernel<S, kInput>, params);
}

template <typename S>
cudaError_t Launch(const W4DecodeParams& params, int32_t blocks, cudaStream_t stream) {
  if (params.input == DecodeInput::kHalf) {
    return LaunchInput<S, DecodeInput::kHalf>(params, blocks, stream);
  }
  return LaunchInput<S, DecodeInput::kRmsNorm>(params, blocks, stream);
}

// A warp's k range fits the registers up to 4 slabs at 8 tokens, 2 at 16.
template <int32_t kGroup>
cudaError_t Dispatch(const W4DecodeParams& params, int32_t blocks, cudaStream_t stream) {
  const int32_t slabs = layout::GpuSlabs(params.columns);
  const int32_t slabs_per_warp = (slabs + kWarps - 1) / kWarps;
  if (params.tokens <= 8) {
    if (slabs_per_warp <= 4) return Launch<Shape<kGroup, 1, 4, true>>(params, blocks, stream);
    return Launch<Shape<kGroup, 1, 2, false>>(params, blocks, stream);
  }
  if (slabs_per_warp <= 2) return Launch<Shape<kGroup, 2, 2, true>>(params, blocks, stream);
  return Launch<Shape<kGroup, 2, 1, false>>(params, blocks, stream);
}

}  // namespace

int32_t W4DecodeBlocks(int32_t rows, int32_t multiprocessors) {
  const int32_t tiles = layout::GpuRowTiles(rows);
  return tiles < multiprocessors ? tiles : multiprocessors;
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
  const int32_t blocks = W4DecodeBlocks(params.rows, multiprocessors);
  switch (params.group) {
    case 0:
      return Dispatch<0>(params, blocks, stream);
    case 32:
      return Dispatch<32>(params, blocks, stream);
    case 64:
      return Dispatch<64>(params, blocks, stream);
    case 128:
      return Dispatch<128>(params, blocks, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nibble::cuda
