// What a program's kernels were compiled for, and how fast a GPU's memory is.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nibble::cuda {

// cudaErrorNoKernelImageForDevice where the current device can run none of them. Launches nothing.
[[nodiscard]] cudaError_t ProbeKernels();

// Whether the kernels that run on the current device are those for Hopper: not where it is another
// GPU, nor where it was given the portable ones. REQUIRES: ProbeKernels succeeds.
[[nodiscard]] bool KernelsForHopper();

// Reads `bytes` (a multiple of 16) once. `sink` gets a word that depends on all of them.
[[nodiscard]] cudaError_t ReadMemory(const void* data, int64_t bytes, uint32_t* sink,
                                     int32_t multiprocessors, cudaStream_t stream);

}  // namespace nibble::cuda
