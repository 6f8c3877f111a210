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

// Activations in 16-bit fixed point, for the integer products of the tensor cores: x = scale * (256
// * high + low) with both bytes signed and one scale a token and slab. [slab][row of 128 bytes], as
// many bytes as fp16 takes. Rows lie so that of eight tokens a lane column gets both bytes of the
// tokens that it would get of fp16 products. Weights in groups of 128.
constexpr int32_t GpuFixedRow(int32_t token, bool high) {
  return token / 8 * 16 + token % 2 * 8 + token % 8 / 2 * 2 + (high ? 0 : 1);
}
// Byte offset of the first of four bytes, which are those of k, k + 2, k + 1, k + 3: as the nibbles
// of a word lie. k is a multiple of four.
constexpr int64_t GpuFixedIndex(int32_t token, int32_t k, bool high, int32_t ordered_tokens) {
  const int32_t c = k % kGpuSlabColumns / 32, step = k % 32 / 4;
  const int32_t row = GpuFixedRow(token, high);
  return (static_cast<int64_t>(k / kGpuSlabColumns) * 2 * ordered_tokens + row) * 128 +
         (step ^ (row % 8)) * 16 + c * 4;
}
// Beside it, [slab][2][ordered tokens] floats: scales, and scaled sums of the slab's k. A lane
// column's tokens lie side by side.
constexpr int64_t GpuFixedScaleIndex(int32_t token, int32_t slab, bool sum,
                                     int32_t ordered_tokens) {
  const int32_t place = token % 8 / 2 * (ordered_tokens / 4) + token / 8 * 2 + token % 2;
  return (static_cast<int64_t>(slab) * 2 + (sum ? 1 : 0)) * ordered_tokens + place;
}
constexpr int64_t GpuFixedScaleCount(int32_t tokens, int32_t columns) {
  return static_cast<int64_t>(GpuSlabs(columns)) * 2 * GpuOrderedTokens(tokens);
}
// Largest number of either sign: its high byte is rounded.
inline constexpr int32_t kGpuFixedMax = 32512;

// Activations of up to 16 tokens as a warp loads them, whole lines at a time, for the fragments of
// mma.m16n8k16: [slab][eight tokens][two k-steps][token][lane column] of eight k side by side.
struct GpuFragmentOrder {
  int32_t token_tiles = 0;  // of eight tokens; 0: [token][k] as it is
  int32_t shift = 2;        // log2 of the k-steps of a group of the weights, less 1

  [[nodiscard]] constexpr bool exists() const { return token_tiles > 0; }
  // Where x[token][k] lies. Eight k from a multiple of eight on lie side by side in either order.
  [[nodiscard]] constexpr int64_t Index(int32_t token, int32_t k, int32_t columns) const {
    if (token_tiles == 0) return static_cast<int64_t>(token) * columns + k;
    const int32_t eight = k % kGpuSlabColumns / 8;
    const int32_t c = (eight >> shift) & 3;
    const int32_t steps = ((eight >> (shift + 2)) << shift) | (eight & ((1 << shift) - 1));
    const int64_t tile = static_cast<int64_t>(k / kGpuSlabColumns) * token_tiles + token / 8;
    return ((tile * 4 + steps) * 32 + token % 8 * 4 + c) * 8 + k % 8;
  }
};
// `group` is that of the weights, 0 for dense ones. One token's activations stay as they are: they
// fill fewer lines.
constexpr GpuFragmentOrder GpuFragments(int32_t tokens, int32_t group) {
  return {.token_tiles = tokens > 1 ? (tokens + 7) / 8 : 0,
          .shift = group == 32   ? 0
                   : group == 64 ? 1
                                 : 2};
}
constexpr int64_t GpuFragmentCount(int32_t tokens, int32_t columns) {
  return static_cast<int64_t>(GpuSlabs(columns)) * ((tokens + 7) / 8) * 8 * kGpuSlabColumns;
}

}  // namespace nibble::layout
