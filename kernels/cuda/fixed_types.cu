// The small operations of elementwise.h and nccl_results.h whose numbers are the same whatever the
// element type of a step.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/elementwise_launch.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/nccl_results.h"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda {
namespace {

constexpr int32_t kThreads = kElementwiseThreads;
constexpr int64_t kFillBlocks = 1024;

__global__ void __launch_bounds__(kThreads) AddKernel(const __grid_constant__ AddParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (at >= p.count) return;
  float4 sum = *reinterpret_cast<const float4*>(p.residual + at);
  const float4 more = *reinterpret_cast<const float4*>(p.projected + at);
  sum.x += more.x;
  sum.y += more.y;
  sum.z += more.z;
  sum.w += more.w;
  *reinterpret_cast<float4*>(p.residual + at) = sum;
}

// A block: a row.
__global__ void __launch_bounds__(kThreads)
    KeepRowsKernel(const __grid_constant__ KeepRowsParams p) {
  __shared__ float parts[kThreads / 32];
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int64_t to = blockIdx.x, from = p.rows[to];
  const auto* x = reinterpret_cast<const uint4*>(p.x + from * p.columns);
  auto* x_out = reinterpret_cast<uint4*>(p.x_out + to * p.columns);
  for (int32_t i = threadIdx.x; i < p.columns / 8; i += kThreads) x_out[i] = x[i];
  const auto* row = reinterpret_cast<const float4*>(p.residual + from * p.hidden);
  auto* row_out = reinterpret_cast<float4*>(p.residual_out + to * p.hidden);
  float squares = 0;
  for (int32_t i = threadIdx.x; i < p.hidden / 4; i += kThreads) {
    const float4 four = row[i];
    row_out[i] = four;
    squares += four.x * four.x + four.y * four.y + four.z * four.z + four.w * four.w;
  }
  squares = SumOfWarp(squares);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
  __syncthreads();
  if (threadIdx.x > 0) return;
  float sum = 0;
  for (const float part : parts) sum += part;
  p.inverse_rms_out[to] = rsqrtf(sum / static_cast<float>(p.hidden) + p.epsilon);
}

__global__ void __launch_bounds__(kThreads)
    CopyBlocksKernel(const __grid_constant__ CopyBlocksParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  uint8_t* part = p.cache + blockIdx.x * p.part_bytes;
  const int64_t from = p.from_to[2 * blockIdx.y], to = p.from_to[2 * blockIdx.y + 1];
  const uint4* source = reinterpret_cast<const uint4*>(part + from * p.block_bytes);
  uint4* target = reinterpret_cast<uint4*>(part + to * p.block_bytes);
  for (int64_t i = threadIdx.x; i < p.block_bytes / 16; i += kThreads) target[i] = source[i];
}

__global__ void __launch_bounds__(kThreads) ScatterKernel(const __grid_constant__ ScatterParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int32_t i = static_cast<int32_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < p.count && p.pairs[2 * i] >= 0) p.target[p.pairs[2 * i]] = p.pairs[2 * i + 1];
}

// Finisher of MurmurHash3.
__device__ __forceinline__ uint32_t Mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ x >> 16;
}

struct FillParams {
  uint8_t* nibbles;
  Real16* reals;
  int64_t count;
  float middle, amplitude;
  uint32_t seed;
  Element element;
};

__global__ void __launch_bounds__(kThreads) FillKernel(const __grid_constant__ FillParams p) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.count;
       i += stride) {
    const uint32_t bits = Mix(static_cast<uint32_t>(i) ^ Mix(p.seed + (i >> 32)));
    if (p.nibbles != nullptr) {
      p.nibbles[i] = static_cast<uint8_t>(bits >> 28);
    } else {
      const float unit = static_cast<float>(bits >> 8) * 0x1p-23f - 1.0f;
      const float value = p.middle + p.amplitude * unit;
      p.reals[i] = {p.element == Element::kHalf ? __half_as_ushort(__float2half(value))
                                                : __bfloat16_as_ushort(__float2bfloat16(value))};
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    JoinLogitsKernel(const __grid_constant__ JoinLogitsParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int32_t row = static_cast<int32_t>(blockIdx.y);
  const int32_t vocab = p.begin[p.ranks];
  for (int32_t i = static_cast<int32_t>(blockIdx.x) * kThreads + threadIdx.x; i < vocab;
       i += static_cast<int32_t>(gridDim.x) * kThreads) {
    int32_t rank = 0;
    while (i >= p.begin[rank + 1]) ++rank;
    const int32_t share = p.begin[rank + 1] - p.begin[rank];
    p.logits[static_cast<int64_t>(row) * vocab + i] =
        p.gathered[rank * p.rank_stride + static_cast<int64_t>(row) * share + i - p.begin[rank]];
  }
}

}  // namespace

cudaError_t AddResidual(const AddParams& params, const LaunchOptions& options) {
  return LaunchKernel(AddKernel, ElementwiseShape(ElementwiseBlocks(params.count / 4), options),
                      params);
}

cudaError_t KeepRows(const KeepRowsParams& params, const LaunchOptions& options) {
  return LaunchKernel(KeepRowsKernel, ElementwiseShape(params.count, options), params);
}

cudaError_t CopyBlocks(const CopyBlocksParams& params, const LaunchOptions& options) {
  LaunchShape shape = ElementwiseShape(params.parts, options);
  shape.grid.y = static_cast<uint32_t>(params.copies);
  return LaunchKernel(CopyBlocksKernel, shape, params);
}

cudaError_t Scatter(const ScatterParams& params, const LaunchOptions& options) {
  return LaunchKernel(ScatterKernel, ElementwiseShape(ElementwiseBlocks(params.count), options),
                      params);
}

cudaError_t FillRandomBytes(uint8_t* nibbles, int64_t count, uint32_t seed, cudaStream_t stream) {
  return LaunchKernel(FillKernel, ElementwiseShape(kFillBlocks, {.stream = stream}),
                      FillParams{nibbles, nullptr, count, 0, 0, seed, Element::kHalf});
}

cudaError_t FillRandomReals(Real16* reals, int64_t count, float middle, float amplitude,
                            uint32_t seed, const LaunchOptions& options) {
  return LaunchKernel(FillKernel, ElementwiseShape(kFillBlocks, options),
                      FillParams{nullptr, reals, count, middle, amplitude, seed, options.element});
}

cudaError_t JoinLogits(const JoinLogitsParams& params, const LaunchOptions& options) {
  constexpr int64_t kBlocksOfRow = 32;
  LaunchShape shape = ElementwiseShape(kBlocksOfRow, options);
  shape.grid.y = static_cast<uint32_t>(params.rows);
  return LaunchKernel(JoinLogitsKernel, shape, params);
}

}  // namespace nibble::cuda
