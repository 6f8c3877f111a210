// Packed weights for the GPU's tensor-core kernels: one form for every batch size.
//
// A slab is 16 rows (out features) x 128 k. Slabs follow each other along k, then along rows, so
// that what one warp reads is contiguous: [row tile][k slab]. A matrix whose columns are no
// multiple of 128 is padded with q = z = 0, s = 0.
//
// The nibbles of a slab are ordered so that a 16-byte load per lane holds the A fragments of
// mma.m16n8k16 for four k-steps: byte 512*h + 16*lane + 4*j is the word of k-step ks = 4*h + j.
// With r = lane / 4, c = lane % 4 and kk(i) = KIndex(ks, c, i):
//
//   nibble 0, 4 = q[r    ][kk(0)], q[r    ][kk(1)]     fragment register 0
//   nibble 1, 5 = q[r + 8][kk(0)], q[r + 8][kk(1)]     fragment register 1
//   nibble 2, 6 = q[r    ][kk(2)], q[r    ][kk(3)]     fragment register 2
//   nibble 3, 7 = q[r + 8][kk(2)], q[r + 8][kk(3)]     fragment register 3
//
// The order of k inside a fragment is free as long as activations follow it; KIndex gives every
// lane a contiguous run of k, so activations load as 16-byte vectors.
//
// Behind the nibbles, per group in the slab: 8 pairs of fp16 scales (row r, row r + 8), then 8
// pairs of zeros as bytes. At group 128 a slab is 1088 bytes: 4.25 bits a weight.
#pragma once

#include <cstdint>

namespace nibble::layout {

inline constexpr int32_t kGpuTileRows = 16;
inline constexpr int32_t kGpuSlabColumns = 128;
inline constexpr int32_t kGpuSlabNibbleBytes = kGpuTileRows * kGpuSlabColumns / 2;
inline constexpr int32_t kGpuGroupBytes = 48;  // 16 fp16 scales, 16 zero bytes

// Rounded up to 64 bytes, so that copies of two slabs and more keep to whole 128-byte lines.
constexpr int32_t GpuSlabBytes(int32_t group) {
  return (kGpuSlabNibbleBytes + kGpuSlabColumns / group * kGpuGroupBytes + 63) / 64 * 64;
}
constexpr int32_t GpuRowTiles(int32_t rows) { return (rows + kGpuTileRows - 1) / kGpuTileRows; }
constexpr int32_t GpuSlabs(int32_t columns) {
  return (columns + kGpuSlabColumns - 1) / kGpuSlabColumns;
}
constexpr int64_t GpuW4Bytes(int32_t rows, int32_t columns, int32_t group) {
  return static_cast<int64_t>(GpuRowTiles(rows)) * GpuSlabs(columns) * GpuSlabBytes(group);
}

// Column inside the slab of element i (0…3) of lane column c (0…3) at k-step ks (0…7). A k-step
// never leaves its group: group 32 holds 2 k-steps, 64 four, 128 eight.
constexpr int32_t GpuKIndex(int32_t ks, int32_t c, int32_t i, int32_t group) {
  const int32_t steps = group / 16;
  return group * (ks / steps) + group / 4 * c + 4 * (ks % steps) + i;
}

// Where q[row][k] of a slab lies: byte offset of the 32-bit word and the nibble in it.
struct GpuNibble {
  int32_t word_byte = 0;
  int32_t nibble = 0;
};
constexpr GpuNibble GpuNibbleAddress(int32_t row, int32_t k, int32_t group) {
  const int32_t steps = group / 16;
  const int32_t in_group = k % group;
  const int32_t c = in_group / (group / 4);
  const int32_t in_lane = in_group % (group / 4);
  const int32_t ks = k / group * steps + in_lane / 4;
  const int32_t i = in_lane % 4;
  const int32_t lane = row % 8 * 4 + c;
  return {512 * (ks / 4) + 16 * lane + 4 * (ks % 4), row / 8 + 2 * (i / 2) + 4 * (i % 2)};
}

}  // namespace nibble::layout
