// W4Wgmma for prompts: tiles of 256 tokens.
#pragma once

#include "kernels/cuda/w4_wgmma.h"

namespace nibble::cuda {

inline constexpr int32_t kPromptTokens = 256;

// REQUIRES: as W4Wgmma, GpuTokenTile(tokens) is kPromptTokens, weights of a group.
[[nodiscard]] cudaError_t W4WgmmaPrompt(const W4BatchParams& params, const WgmmaInput& input,
                                        int32_t multiprocessors, const LaunchOptions& options);

}  // namespace nibble::cuda
