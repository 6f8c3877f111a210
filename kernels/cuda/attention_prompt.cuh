// The kernel for tiles of prompts, launched by attention.cu.
#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/cuda/element.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {

[[nodiscard]] cudaError_t AttendPrompt(const AttentionParams& params, const LaunchOptions& options);

}  // namespace nibble::cuda::NIBBLE_ELEMENT
