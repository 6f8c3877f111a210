// W4A16 matrix products of more than a few tokens on Hopper, on the same packed weights as
// w4_decode.h.
//
// A block computes tiles of 256 rows (128 where weights are dense) and 16 to 128 tokens. Four warps
// bring weights and activations by bulk copies into a ring in shared memory; two or four warpgroups
// widen weights in registers and multiply them on the tensor cores: (q - zero) * scale rounded once
// to the element type, or, up to 64 tokens with groups of 128, q - zero as it is and a slab's sums
// by its scales in fp32. Where there are few tiles, blocks share one along k: they leave their
// parts to the kernel that follows, or meet in the L2, or, a cluster, add them up over each other's
// shared memory, in order: results do not vary from run to run. Prompts go to w4_wgmma_prompt.cu.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/w4_batch.h"
#include "kernels/cuda/w4_order.h"
#include "kernels/cuda/w4_wgmma_plan.h"

namespace nibble::cuda {

struct WgmmaInput {
  const Real16* ordered = nullptr;  // what stands for params.x, which is not read
  // Not null: `ordered` is in fixed point with these scales (kernels/layout/gpu_x.h). Of groups of
  // 128.
  const float* fixed_scales = nullptr;
  // square_sums != nullptr: `ordered` stands for a normed input (w4_decode.h).
  NormedInput normed = {};
  // With kSiluMul, in the place of y_half: the input of the next product, in order. Its columns
  // (rows / 2) must then be a multiple of 128.
  Real16* next_ordered = nullptr;
  int32_t next_group = 128;
  // Not null: what is left for the next product is in fixed point, with these scales. After SiLU
  // only where W4WgmmaFixedSilu says so, and `ordered` is in fixed point, too.
  float* next_scales = nullptr;
  // With kAddResidual and a `meeting`: what the next norm's product takes in. next.x is in the
  // order of next_group, or in fixed point; next.square_sums has a part for every slab of rows.
  // Blocks that share a tile along k add up their parts in `meeting`, [W4WgmmaParts][tokens, rows],
  // in which all bits are set before and after. Rows are a multiple of 8. All blocks must come to
  // run at the same time: nothing else may hold a multiprocessor for ever.
  NextInput next = {};
  float* meeting = nullptr;
  // In the place of residual_out or y_half: every block that shares a tile along k leaves what it
  // has, [W4WgmmaParts][tokens, rows], for OrderedNorm or attention to add up. At most
  // kWgmmaPartsTokens tokens; not with kSiluMul.
  float* parts = nullptr;
  // Not null: idle multiprocessors take a part of every tile (W4WgmmaHelp), through words of which
  // all bits are set before and after. As with a meeting, all blocks must come to run.
  float* help = nullptr;
};

// REQUIRES: a device of compute capability 9.0, columns a multiple of 8, 16-byte aligned pointers.
// Graph-capturable.
[[nodiscard]] cudaError_t W4Wgmma(const W4BatchParams& params, const WgmmaInput& input,
                                  int32_t multiprocessors, const LaunchOptions& options);

}  // namespace nibble::cuda
