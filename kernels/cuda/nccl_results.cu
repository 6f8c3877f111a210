#include "kernels/cuda/nccl_results.h"

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {
namespace {

constexpr int32_t kRowThreads = 256;

__global__ void __launch_bounds__(kRowThreads)
    AddPartialKernel(const __grid_constant__ AddPartialParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int64_t at = 4 * (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x);
  if (at >= p.count) return;
  float4 value;
  if (p.partial_half != nullptr) {
    const float2 low = ToFloats(*reinterpret_cast<const Real16x2*>(p.partial_half + at));
    const float2 high = ToFloats(*reinterpret_cast<const Real16x2*>(p.partial_half + at + 2));
    value = make_float4(low.x, low.y, high.x, high.y);
  } else {
    value = *reinterpret_cast<const float4*>(p.partial_float + at);
  }
  float4 residual = *reinterpret_cast<float4*>(p.residual + at);
  residual.x += value.x;
  residual.y += value.y;
  residual.z += value.z;
  residual.w += value.w;
  *reinterpret_cast<float4*>(p.residual + at) = residual;
}

}  // namespace

cudaError_t AddPartial(const AddPartialParams& params, const LaunchOptions& options) {
  const int64_t blocks = (params.count / 4 + kRowThreads - 1) / kRowThreads;
  return LaunchKernel(AddPartialKernel,
                      {.grid = dim3(static_cast<uint32_t>(blocks)),
                       .block = dim3(kRowThreads),
                       .stream = options.stream,
                       .dependent = options.dependent},
                      params);
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
