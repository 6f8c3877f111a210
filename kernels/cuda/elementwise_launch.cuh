// Blocks of kernels that do their work by numbers, or by eights of them, without a tile's shape.
#pragma once

#include <cstdint>

#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/launch.cuh"

namespace nibble::cuda {

inline constexpr int32_t kElementwiseThreads = 256;  // of a block

[[nodiscard]] inline LaunchShape ElementwiseShape(int64_t blocks, const LaunchOptions& options) {
  return {.grid = dim3(static_cast<uint32_t>(blocks)),
          .block = dim3(kElementwiseThreads),
          .stream = options.stream,
          .dependent = options.dependent};
}

// That have a thread for each piece of `work`.
[[nodiscard]] constexpr int64_t ElementwiseBlocks(int64_t work) {
  return (work + kElementwiseThreads - 1) / kElementwiseThreads;
}

}  // namespace nibble::cuda
