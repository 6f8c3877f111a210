// Activations in the order in which the tensor cores take the slabs of gpu_w4.h: what a matrix
// product of many tokens reads by whole bulk copies.
//
// A slab's 128 k of all tokens lie together, in two halves of four k-steps: [slab][half][token] of
// 128 bytes, 16 k in two 16-byte chunks for each k-step. The k of a chunk are those of the four
// lane columns (GpuKIndex), and chunk i of token t lies at i ^ (t % 8), as the swizzle of 128 bytes
// has it. Tokens are padded to whole tiles; what padding holds is never read into a result.
#pragma once

#include <cstdint>

#include "kernels/layout/gpu_w4.h"

namespace nibble::layout {

// Tokens that a block of the product takes at a time: the fewest that hold them all, or tiles that
// leave little over.
constexpr int32_t GpuTokenTile(int32_t tokens) {
  if (tokens <= 16) return 16;
  if (tokens <= 32) return 32;
  if (tokens <= 64) return 64;
  if (tokens > 512 && (256 - tokens % 256) % 256 <= tokens / 12) return 256;
  return tokens <= 96 || (tokens > 128 && tokens <= 192) ? 96 : 128;
}
constexpr int32_t GpuOrderedTokens(int32_t tokens) {
  const int32_t tile = GpuTokenTile(tokens);
  return (tokens + tile - 1) / tile * tile;
}
constexpr int64_t GpuOrderedCount(int32_t tokens, int32_t columns) {
  return static_cast<int64_t>(GpuSlabs(columns)) * GpuOrderedTokens(tokens) * kGpuSlabColumns;
}

// Where x[token][k] lies. `group` is that of the weights, 128 for dense ones. An even k and the
// next lie side by side.
constexpr int64_t GpuOrderedIndex(int32_t token, int32_t k, int32_t group, int32_t ordered_tokens) {
  const int32_t steps = group / 16;
  const int32_t in_slab = k % kGpuSlabColumns;
  const int32_t in_group = in_slab % group;
  const int32_t c = in_group / (group / 4);
  const int32_t in_lane = in_group % (group / 4);
  const int32_t step = in_slab / group * steps + in_lane / 4;
  const int32_t chunk = 2 * (step % 4) + in_lane % 4 / 2;
  const int64_t row =
      (static_cast<int64_t>(k / kGpuSlabColumns) * 2 + step / 4) * ordered_tokens + token;
  return row * 64 + (chunk ^ (token % 8)) * 8 + 2 * c + k % 2;
}

}  // namespace nibble::layout
