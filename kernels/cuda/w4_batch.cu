#include "kernels/cuda/w4_batch.h"

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/w4_widen.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {
namespace {

constexpr int32_t kWarps = 8;
constexpr int32_t kThreads = kWarps * 32;
constexpr int32_t kTilesOfBlock = 8;  // row tiles of 16
constexpr int32_t kStages = 3;        // slabs of activations in shared memory
constexpr int32_t kDenseSlabBytes = layout::kGpuTileRows * layout::kGpuSlabColumns * 2;

// Warps stand kRowWarps x kTokenWarps; each has kRowTiles row tiles and kTokenTiles token tiles.
template <int32_t kGroupT, int32_t kRowTilesT, int32_t kTokenTilesT>
struct Shape {
  static constexpr int32_t kGroup = kGroupT;
  static constexpr int32_t kRowTiles = kRowTilesT;
  static constexpr int32_t kTokenTiles = kTokenTilesT;
  static constexpr int32_t kRowWarps = kTilesOfBlock / kRowTiles;
  static constexpr int32_t kTokenWarps = kWarps / kRowWarps;
  static constexpr int32_t kTokens = kTokenWarps * kTokenTiles * 8;
  static constexpr int32_t kSlabBytes =
      kGroup == 0 ? kDenseSlabBytes : layout::GpuSlabBytes(kGroup == 0 ? 128 : kGroup);
  static constexpr int32_t kMapGroup = kGroup == 0 ? 128 : kGroup;  // of GpuKIndex
  // A pair of k-steps: [token][lane column] of 16 bytes, apart by 32 more so that the copies of a
  // token's columns fall into different banks.
  static constexpr int32_t kPairBytes = kTokens * 64 + 32;
  static constexpr int32_t kStageBytes = 4 * kPairBytes;
  static constexpr int32_t kWords = kGroup == 0 ? 8 : 2;  // 16-byte loads of a slab and lane
};

__device__ __forceinline__ void CopyAsync16(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
               "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CommitCopies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int32_t kPending>
__device__ __forceinline__ void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Brings the slab's activations of the block's tokens into a stage; what does not exist is zero.
template <typename S>
__device__ __forceinline__ void CopyActivations(const W4BatchParams& p, int32_t first_token,
                                                int32_t slab, uint8_t* stage) {
#pragma unroll
  for (int32_t i = 0; i < S::kTokens * 16 / kThreads; ++i) {
    const int32_t index = i * kThreads + static_cast<int32_t>(threadIdx.x);
    const int32_t unit = index % 16, token = index / 16;
    const int32_t in_group = unit * 8 % S::kMapGroup;
    const int32_t c = in_group / (S::kMapGroup / 4);
    const int32_t pair =
        unit * 8 / S::kMapGroup * (S::kMapGroup / 32) + in_group % (S::kMapGroup / 4) / 8;
    const int32_t k = slab * layout::kGpuSlabColumns + unit * 8;
    const bool exists = first_token + token < p.tokens && k < p.columns;
    const int64_t from = exists ? static_cast<int64_t>(first_token + token) * p.columns + k : 0;
    CopyAsync16(stage + pair * S::kPairBytes + token * 64 + c * 16, p.x + from, exists);
  }
}

// One lane's weights of a slab.
template <typename S>
struct SlabWords {
  uint4 words[S::kRowTiles][S::kWords];
  half2 scales[S::kRowTiles][S::kGroup == 0 ? 1 : 128 / S::kMapGroup];  // rows r, r + 8
  uint16_t zeros[S::kRowTiles][S::kGroup == 0 ? 1 : 128 / S::kMapGroup];
};

template <typename S>
__device__ __forceinline__ void LoadSlabs(const uint8_t* const (&tiles)[S::kRowTiles], int32_t slab,
                                          int32_t lane, SlabWords<S>* w) {
#pragma unroll
  for (int32_t tile = 0; tile < S::kRowTiles; ++tile) {
    const uint8_t* from = tiles[tile] + static_cast<int64_t>(slab) * S::kSlabBytes;
#pragma unroll
    for (int32_t i = 0; i < S::kWords; ++i) {
      w->words[tile][i] = __ldg(reinterpret_cast<const uint4*>(from + i * 512 + lane * 16));
    }
    if constexpr (S::kGroup != 0) {
#pragma unroll
      for (int32_t group = 0; group < 128 / S::kMapGroup; ++group) {
        const uint8_t* constants =
            from + layout::kGpuSlabNibbleBytes + group * layout::kGpuGroupBytes;
        w->scales[tile][group] = __ldg(reinterpret_cast<const half2*>(constants + lane / 4 * 4));
        w->zeros[tile][group] =
            __ldg(reinterpret_cast<const uint16_t*>(constants + 32 + lane / 4 * 2));
      }
    }
  }
}

template <typename S>
__device__ __forceinline__ void MakeFragment(const SlabWords<S>& w, int32_t tile, int32_t step,
                                             const GroupConstants& constants, uint32_t (&a)[4]) {
  if constexpr (S::kGroup == 0) {
    const uint4& four = w.words[tile][step];
    a[0] = four.x;
    a[1] = four.y;
    a[2] = four.z;
    a[3] = four.w;
  } else {
    Widen(Word(w.words[tile][step / 4], step % 4), constants, a);
  }
}

template <typename S>
__device__ __forceinline__ void MultiplySlab(const SlabWords<S>& w, const uint8_t* stage,
                                             int32_t token_warp, int32_t lane,
                                             float (&acc)[S::kRowTiles][S::kTokenTiles][4]) {
  constexpr int32_t kStepsOfGroup = S::kMapGroup / 16;
  GroupConstants constants[S::kRowTiles];
#pragma unroll
  for (int32_t pair = 0; pair < 4; ++pair) {
    if (S::kGroup != 0 && 2 * pair % kStepsOfGroup == 0) {
#pragma unroll
      for (int32_t tile = 0; tile < S::kRowTiles; ++tile) {
        const int32_t group = 2 * pair / kStepsOfGroup;
        constants[tile] = MakeConstants(w.scales[tile][group], w.zeros[tile][group]);
      }
    }
    uint32_t a[2][S::kRowTiles][4];
#pragma unroll
    for (int32_t tile = 0; tile < S::kRowTiles; ++tile) {
      MakeFragment<S>(w, tile, 2 * pair, constants[tile], a[0][tile]);
      MakeFragment<S>(w, tile, 2 * pair + 1, constants[tile], a[1][tile]);
    }
    const uint8_t* x = stage + pair * S::kPairBytes + token_warp * S::kTokenTiles * 512;
#pragma unroll
    for (int32_t t = 0; t < S::kTokenTiles; ++t) {
      const uint4 b = LoadShared128(x + t * 512 + lane * 16);
#pragma unroll
      for (int32_t tile = 0; tile < S::kRowTiles; ++tile) {
        Mma(acc[tile][t], a[0][tile], b.x, b.y);
        Mma(acc[tile][t], a[1][tile], b.z, b.w);
      }
    }
  }
}

// Rows r, r + 8 of tokens 2c, 2c + 1 of one accumulator tile.
__device__ __forceinline__ void StoreTile(const W4BatchParams& p, int32_t row_tile,
                                          int32_t first_token, int32_t lane,
                                          const float (&acc)[4]) {
  const int32_t row = row_tile * layout::kGpuTileRows + lane / 4;
#pragma unroll
  for (int32_t j = 0; j < 2; ++j) {
    const int64_t token = first_token + lane % 4 * 2 + j;
    if (token >= p.tokens) continue;
    float value[2] = {acc[j], acc[2 + j]};
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      if (p.bias != nullptr && row + 8 * i < p.rows) value[i] += ToFloat(p.bias[row + 8 * i]);
    }
    if (p.output == DecodeOutput::kSiluMul) {
      const int32_t column = row_tile * 8 + lane / 4;
      const float silu = value[0] / (1.0f + __expf(-value[0]));
      if (column < p.rows / 2) {
        p.y_half[token * (p.rows / 2) + column] = ToReal(silu * value[1]);
      }
      continue;
    }
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      if (row + 8 * i >= p.rows) continue;
      const int64_t at = token * p.rows + row + 8 * i;
      if (p.output == DecodeOutput::kHalf) {
        p.y_half[at] = ToReal(value[i]);
      } else if (p.output == DecodeOutput::kFloat) {
        p.y_float[at] = value[i];
      } else {
        p.residual_out[at] += value[i];
      }
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    W4BatchKernel(const __grid_constant__ W4BatchParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t row_warp = warp % S::kRowWarps, token_warp = warp / S::kRowWarps;
  const int32_t first_token = static_cast<int32_t>(blockIdx.x) * S::kTokens;
  const int32_t slabs = layout::GpuSlabs(p.columns);
  const int32_t last_tile = layout::GpuRowTiles(p.rows) - 1;
  const int32_t first_tile =
      static_cast<int32_t>(blockIdx.y) * kTilesOfBlock + row_warp * S::kRowTiles;
  const uint8_t* tiles[S::kRowTiles];
#pragma unroll
  for (int32_t tile = 0; tile < S::kRowTiles; ++tile) {
    tiles[tile] =
        p.slabs + static_cast<int64_t>(min(first_tile + tile, last_tile)) * slabs * S::kSlabBytes;
  }
  SlabWords<S> next;
  LoadSlabs<S>(tiles, 0, lane, &next);
  WaitForPreviousKernel();
  LetNextKernelStart();
#pragma unroll
  for (int32_t stage = 0; stage < kStages - 1; ++stage) {
    if (stage < slabs) CopyActivations<S>(p, first_token, stage, shared + stage * S::kStageBytes);
    CommitCopies();
  }
  float acc[S::kRowTiles][S::kTokenTiles][4] = {};
  for (int32_t slab = 0; slab < slabs; ++slab) {
    const SlabWords<S> now = next;
    WaitForCopies<kStages - 2>();
    __syncthreads();
    const int32_t ahead = slab + kStages - 1;
    if (ahead < slabs) {
      CopyActivations<S>(p, first_token, ahead, shared + ahead % kStages * S::kStageBytes);
    }
    CommitCopies();
    if (slab + 1 < slabs) LoadSlabs<S>(tiles, slab + 1, lane, &next);
    MultiplySlab<S>(now, shared + slab % kStages * S::kStageBytes, token_warp, lane, acc);
  }
#pragma unroll
  for (int32_t tile = 0; tile < S::kRowTiles; ++tile) {
    if (first_tile + tile > last_tile) continue;
#pragma unroll
    for (int32_t t = 0; t < S::kTokenTiles; ++t) {
      StoreTile(p, first_tile + tile, first_token + (token_warp * S::kTokenTiles + t) * 8, lane,
                acc[tile][t]);
    }
  }
}

template <typename S>
cudaError_t LaunchShapeOf(const W4BatchParams& params, const LaunchOptions& options) {
  constexpr int32_t kBytes = kStages * S::kStageBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(W4BatchKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int32_t token_tiles = (params.tokens + S::kTokens - 1) / S::kTokens;
  const int32_t row_blocks = (layout::GpuRowTiles(params.rows) + kTilesOfBlock - 1) / kTilesOfBlock;
  return LaunchKernel(
      W4BatchKernel<S>,
      {.grid = dim3(static_cast<uint32_t>(token_tiles), static_cast<uint32_t>(row_blocks)),
       .block = dim3(kThreads),
       .shared_bytes = kBytes,
       .stream = options.stream,
       .dependent = options.dependent},
      params);
}

template <int32_t kGroup>
cudaError_t LaunchGroup(const W4BatchParams& params, const LaunchOptions& options) {
  if (params.tokens <= 16) return LaunchShapeOf<Shape<kGroup, 1, 2>>(params, options);
  if (params.tokens <= 32) return LaunchShapeOf<Shape<kGroup, 1, 4>>(params, options);
  if (params.tokens <= 64 && kGroup != 0)
    return LaunchShapeOf<Shape<kGroup, 1, 8>>(params, options);
  // Dense fragments take four times the registers.
  return LaunchShapeOf<Shape<kGroup, kGroup == 0 ? 1 : 2, 8>>(params, options);
}

}  // namespace

cudaError_t W4Batch(const W4BatchParams& params, const LaunchOptions& options) {
  if (params.tokens < 1 || params.columns % 8 != 0) return cudaErrorInvalidValue;
  switch (params.group) {
    case 0:
      return LaunchGroup<0>(params, options);
    case 32:
      return LaunchGroup<32>(params, options);
    case 64:
      return LaunchGroup<64>(params, options);
    case 128:
      return LaunchGroup<128>(params, options);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
