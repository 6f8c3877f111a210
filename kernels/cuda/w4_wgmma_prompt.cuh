// W4Wgmma for prompts: tiles of 256 tokens.
#pragma once

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/w4_wgmma.h"
#include "kernels/layout/gpu_x.h"

namespace nibble::cuda::NIBBLE_ELEMENT {

inline constexpr int32_t kPromptTokens = 256;
inline constexpr int32_t kPromptRows = 256;  // of a cluster of two blocks

// Whether such tiles leave few multiprocessors without work, and tokens are padded to whole ones.
[[nodiscard]] constexpr bool PromptTilesFit(const W4BatchParams& params, int32_t multiprocessors) {
  const int32_t tokens = layout::GpuOrderedTokens(params.tokens);
  if (params.group == 0 || tokens % kPromptTokens != 0 || multiprocessors < 2) return false;
  const int32_t tiles = (params.rows + kPromptRows - 1) / kPromptRows * (tokens / kPromptTokens);
  const int32_t clusters = multiprocessors / 2;
  const int32_t rounds = (tiles + clusters - 1) / clusters;
  return 10 * int64_t{tiles} >= 7 * int64_t{rounds} * clusters;
}

// REQUIRES: as W4Wgmma; PromptTilesFit.
[[nodiscard]] cudaError_t W4WgmmaPrompt(const W4BatchParams& params, const WgmmaInput& input,
                                        int32_t multiprocessors, const LaunchOptions& options);

}  // namespace nibble::cuda::NIBBLE_ELEMENT
