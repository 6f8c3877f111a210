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
  int32_t cluster = 1;     // blocks side by side that reach each other's shared memory
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
  cudaLaunchAttribute attributes[2] = {};
  if (shape.dependent) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<uint32_t>(shape.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  config.attrs = attributes;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// How many clusters of such a launch the device runs at a time: fewer than its multiprocessors
// would make, where groups of those are no multiples of a cluster.
template <typename Params>
[[nodiscard]] cudaError_t CountClusters(void (*kernel)(Params), const LaunchShape& shape,
                                        int32_t* clusters) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<uint32_t>(shape.cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
}

}  // namespace nibble::cuda
