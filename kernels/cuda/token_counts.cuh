// How often each token id stands in a slot's prompt and output.
#pragma once

#include <cstdint>

#include "kernels/cuda/token_counts.h"

namespace nibble::cuda {

__device__ __forceinline__ void AddOutput(TokenCount* count) {
  if ((*count & kOutputMax) < kOutputMax) ++*count;
}

}  // namespace nibble::cuda
