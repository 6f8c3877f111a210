// Attention for GPUs before Hopper: the same inputs and results as attention.h, one kernel for
// prompts and decode steps.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/attention.h"

namespace nibble::cuda {

// Every unit's and tile's rows are taken sixteen at a time, each sixteen by one block, which reads
// all that they see; the ranges and parts of units are not followed and no scratch is used.
// REQUIRES: AttentionSupports(heads, kv_heads, head_dim), no rotation.
[[nodiscard]] cudaError_t AttentionPortable(const AttentionParams& params,
                                            const LaunchOptions& options);

}  // namespace nibble::cuda
