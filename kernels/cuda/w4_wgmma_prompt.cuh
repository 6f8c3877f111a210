// W4Wgmma for prompts: tiles of 256 tokens.
#pragma once

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/w4_wgmma.h"

namespace nibble::cuda::NIBBLE_ELEMENT {

// REQUIRES: as W4Wgmma; PromptTilesFit.
[[nodiscard]] cudaError_t W4WgmmaPrompt(const W4BatchParams& params, const WgmmaInput& input,
                                        int32_t multiprocessors, const LaunchOptions& options);

}  // namespace nibble::cuda::NIBBLE_ELEMENT
