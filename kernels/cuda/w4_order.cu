#include "kernels/cuda/w4_order.h"

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda {
namespace {

constexpr int32_t kOrderThreads = 128;
constexpr int32_t kOrderTokens = 32;  // of a block

// A block: 32 tokens of a slab. A thread: one token's 8 k of each of the four lane columns that two
// k-steps take, which are four whole chunks.
__global__ void __launch_bounds__(kOrderThreads)
    OrderKernel(const __grid_constant__ OrderParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t token = static_cast<int32_t>(blockIdx.y) * kOrderTokens + thread / 4;
  if (token >= p.tokens) return;
  const int32_t group = p.group == 0 ? 128 : p.group;
  const int32_t slab = static_cast<int32_t>(blockIdx.x), pair = thread % 4;
  uint4 from[4];
#pragma unroll
  for (int32_t c = 0; c < 4; ++c) {
    const int32_t k = slab * layout::kGpuSlabColumns + layout::GpuKIndex(pair * 2, c, 0, group);
    from[c] =
        k < p.columns
            ? *reinterpret_cast<const uint4*>(p.x + static_cast<int64_t>(token) * p.columns + k)
            : make_uint4(0, 0, 0, 0);
  }
  const int64_t row =
      (static_cast<int64_t>(slab) * 2 + pair / 2) * layout::GpuOrderedTokens(p.tokens) + token;
  auto* to = reinterpret_cast<uint4*>(p.ordered + row * 64);
  const int32_t first = pair % 2 * 4;
  to[first ^ (token % 8)] = make_uint4(from[0].x, from[1].x, from[2].x, from[3].x);
  to[(first + 1) ^ (token % 8)] = make_uint4(from[0].y, from[1].y, from[2].y, from[3].y);
  to[(first + 2) ^ (token % 8)] = make_uint4(from[0].z, from[1].z, from[2].z, from[3].z);
  to[(first + 3) ^ (token % 8)] = make_uint4(from[0].w, from[1].w, from[2].w, from[3].w);
}

constexpr int32_t kNormThreads = 256;

__device__ __forceinline__ float BlockSum(float value) {
  __shared__ float parts[kNormThreads / 32];
#pragma unroll
  for (int32_t offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (const float part : parts) sum += part;
  return sum;
}

// A block: one token. A thread: 8 k side by side, which are pairs in four chunks.
__global__ void __launch_bounds__(kNormThreads)
    OrderedNormKernel(const __grid_constant__ OrderedNormParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const auto token = static_cast<int32_t>(blockIdx.x);
  const float* row =
      p.residual + static_cast<int64_t>(p.rows == nullptr ? token : p.rows[token]) * p.hidden;
  float squares = 0;
#pragma unroll 4
  for (int32_t k = static_cast<int32_t>(threadIdx.x) * 4; k < p.hidden; k += kNormThreads * 4) {
    const float4 x = *reinterpret_cast<const float4*>(row + k);
    squares += x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w;
  }
  const float inverse = rsqrtf(BlockSum(squares) / static_cast<float>(p.hidden) + p.epsilon);
  const int32_t group = p.group == 0 ? 128 : p.group;
  const int32_t ordered_tokens = layout::GpuOrderedTokens(p.tokens);
  const int32_t padded = layout::GpuSlabs(p.hidden) * layout::kGpuSlabColumns;
  for (int32_t k = static_cast<int32_t>(threadIdx.x) * 8; k < padded; k += kNormThreads * 8) {
    half2 values[4] = {};
    if (k < p.hidden) {
      const float4 low = *reinterpret_cast<const float4*>(row + k);
      const float4 high = *reinterpret_cast<const float4*>(row + k + 4);
      const uint4 weights = __ldg(reinterpret_cast<const uint4*>(p.weight + k));
      const auto* weight = reinterpret_cast<const half2*>(&weights);
      const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        const float2 w = __half22float2(weight[i]);
        values[i] = __floats2half2_rn(x[2 * i] * inverse * w.x, x[2 * i + 1] * inverse * w.y);
      }
    }
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      const int64_t at = layout::GpuOrderedIndex(token, k + 2 * i, group, ordered_tokens);
      *reinterpret_cast<half2*>(p.ordered + at) = values[i];
    }
  }
}

}  // namespace

cudaError_t OrderActivations(const OrderParams& params, const LaunchOptions& options) {
  if (params.tokens < 1 || params.columns % 8 != 0) return cudaErrorInvalidValue;
  const int32_t blocks = (params.tokens + kOrderTokens - 1) / kOrderTokens;
  return LaunchKernel(OrderKernel,
                      {.grid = dim3(static_cast<uint32_t>(layout::GpuSlabs(params.columns)),
                                    static_cast<uint32_t>(blocks)),
                       .block = dim3(kOrderThreads),
                       .stream = options.stream,
                       .dependent = options.dependent},
                      params);
}

cudaError_t OrderedNorm(const OrderedNormParams& params, const LaunchOptions& options) {
  if (params.tokens < 1 || params.hidden % 8 != 0) return cudaErrorInvalidValue;
  return LaunchKernel(OrderedNormKernel,
                      {.grid = dim3(static_cast<uint32_t>(params.tokens)),
                       .block = dim3(kNormThreads),
                       .stream = options.stream,
                       .dependent = options.dependent},
                      params);
}

}  // namespace nibble::cuda
