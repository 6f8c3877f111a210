// The kernel for tiles of prompts, launched by attention.cu.
#pragma once

#include "kernels/cuda/attention.h"

namespace nibble::cuda {

[[nodiscard]] cudaError_t AttendPrompt(const AttentionParams& params, const LaunchOptions& options);

}  // namespace nibble::cuda
