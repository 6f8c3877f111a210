#include "kernels/cuda/probe.h"

namespace nibble::cuda {
namespace {

constexpr int32_t kThreads = 512;
constexpr int32_t kLoads = 8;  // in flight, of 16 bytes each
constexpr int32_t kBlocksOfMultiprocessor = 4;

__global__ void ProbeKernel() {}

__global__ void __launch_bounds__(kThreads)
    ReadKernel(const uint4* data, int64_t count, uint32_t* sink) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  uint32_t mixed = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += stride * kLoads) {
    uint4 loaded[kLoads] = {};
#pragma unroll
    for (int32_t j = 0; j < kLoads; ++j) {
      if (i + j * stride < count) loaded[j] = __ldcs(data + i + j * stride);
    }
#pragma unroll
    for (int32_t j = 0; j < kLoads; ++j) {
      mixed ^= loaded[j].x ^ loaded[j].y ^ loaded[j].z ^ loaded[j].w;
    }
  }
  atomicXor(sink, mixed);
}

}  // namespace

cudaError_t ProbeKernels() {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, ProbeKernel);
}

bool KernelsForHopper() {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, ProbeKernel) == cudaSuccess &&
         attributes.ptxVersion == 90;
}

cudaError_t ReadMemory(const void* data, int64_t bytes, uint32_t* sink, int32_t multiprocessors,
                       cudaStream_t stream) {
  ReadKernel<<<static_cast<uint32_t>(kBlocksOfMultiprocessor * multiprocessors), kThreads, 0,
               stream>>>(static_cast<const uint4*>(data), bytes / 16, sink);
  return cudaGetLastError();
}

}  // namespace nibble::cuda
