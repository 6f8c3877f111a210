// Whether this program's kernels were compiled for a GPU.
#pragma once

#include <cuda_runtime_api.h>

namespace nibble::cuda {

// cudaErrorNoKernelImageForDevice where the current device can run none of them. Launches nothing.
[[nodiscard]] cudaError_t ProbeKernels();

}  // namespace nibble::cuda
