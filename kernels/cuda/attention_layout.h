// Where the KV cache keeps an element. One KV block and head is one piece of memory, 16 positions
// of keys (or values), and lies as the tensor cores want it in shared memory: two groups of eight
// positions, a group cut into panels of up to 64 elements, a row of a panel for each position, and
// the row's 16-byte chunks in an order that differs from row to row (the hardware's swizzle of rows
// of 128, 64 or 32 bytes). So a plain copy brings what ldmatrix reads without bank conflicts and
// what a warpgroup's product takes as it is.
#pragma once

#include <cstdint>

namespace nibble::cuda {

inline constexpr int32_t kKvBlockTokens = 16;

[[nodiscard]] constexpr int32_t KvRowBytes(int32_t head_dim) {
  return head_dim >= 64 ? 128 : 2 * head_dim;
}

// The place of byte `at` after swizzling rows of `row_bytes`; a group begins at a multiple of eight
// rows.
[[nodiscard]] constexpr int32_t KvSwizzle(int32_t at, int32_t row_bytes) {
  return at ^ (at >> 7 & (row_bytes / 16 - 1)) << 4;
}

// Halves from the start of a block and head to an element of a position (0 … 15).
[[nodiscard]] constexpr int32_t KvOffset(int32_t position, int32_t element, int32_t head_dim) {
  const int32_t row_bytes = KvRowBytes(head_dim);
  const int32_t panels = 2 * head_dim / row_bytes;
  const int32_t panel = 2 * element / row_bytes;
  const int32_t row = (position / 8 * panels + panel) * 8 + position % 8;
  return KvSwizzle(row * row_bytes + 2 * element % row_bytes, row_bytes) / 2;
}

}  // namespace nibble::cuda
