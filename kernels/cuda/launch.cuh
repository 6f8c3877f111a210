// Launching a kernel with or without programmatic dependent launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nibble::cuda {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  int32_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
  bool dependent = false;  // may start its prologue before the kernel before it has ended
};

// A dependent kernel must call WaitForPreviousKernel (ptx.cuh) in every block before it touches
// what other kernels write.
template <typename Params>
[[nodiscard]] cudaError_t LaunchKernel(void (*kernel)(Params), const LaunchShape& shape,
                                       const Params& params) {
  // Kernels share a multiprocessor only where they divide its memory alike between cache and
  // shared memory, so all ask for the same.
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = shape.stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace nibble::cuda
