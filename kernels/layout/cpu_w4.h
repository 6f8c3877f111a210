// Packed weights for CPU kernels: one layout for every instruction set.
//
// 16 rows x 4 k interleaved. A row block is 16 rows; the blocks of 16 rows follow each other, and
// inside a block k rises: one thread reads one long linear stream. 64 bytes hold 16 rows x 8 k:
//
//   byte 4*r + j  (r = row in block 0…15, j = 0…3)
//     low nibble  = q[row r][8*o + j]          o = index of the 64-byte vector in the block
//     high nibble = q[row r][8*o + 4 + j]
//
// so that AND and SHIFT give the two dpbusd operands (16 rows x 4 k), and the same bytes are rows
// of an AMX B tile. 8-bit matrices (the head) hold one 64-byte vector per 4 k: byte 4*r + j is
// w[row r][4*o + j] + 128.
//
// Scales and zeros lie in streams of their own, [row block][group][16], so that the nibble
// stream stays 64-byte aligned. The last row block is padded with q = z = 0, s = 0.
// Dense matrices (fp16, bf16, fp32): [row block][k][16].
#pragma once

#include <cstdint>

namespace nibble::layout {

inline constexpr int32_t kRowBlock = 16;
inline constexpr int32_t kInt8Group = 32;  // columns per scale of an int8 head
inline constexpr int64_t kAlignment = 64;

constexpr int32_t RowBlocks(int32_t rows) { return (rows + kRowBlock - 1) / kRowBlock; }

// A layout of packed weights can hold groups of these sizes only; longer groups are regrouped.
constexpr bool GroupSupported(int32_t group) { return group == 32 || group == 64 || group == 128; }

constexpr int64_t W4NibbleBytes(int32_t rows, int32_t columns) {
  return static_cast<int64_t>(RowBlocks(rows)) * kRowBlock * columns / 2;
}
constexpr int64_t GroupEntries(int32_t rows, int32_t columns, int32_t group) {
  return static_cast<int64_t>(RowBlocks(rows)) * kRowBlock * (columns / group);
}
constexpr int64_t Int8Bytes(int32_t rows, int32_t columns) {
  return static_cast<int64_t>(RowBlocks(rows)) * kRowBlock * columns;
}
constexpr int64_t DenseEntries(int32_t rows, int32_t columns) {
  return static_cast<int64_t>(RowBlocks(rows)) * kRowBlock * columns;
}

// Byte and nibble of q[row][k] inside the nibble stream.
struct NibbleAddress {
  int64_t byte = 0;
  int32_t shift = 0;  // 0 or 4
};
constexpr NibbleAddress W4Address(int32_t row, int32_t k, int32_t columns) {
  const int64_t block = row / kRowBlock;
  return {block * kRowBlock * columns / 2 + static_cast<int64_t>(k / 8) * 64 +
              (row % kRowBlock) * 4 + k % 4,
          (k % 8) / 4 * 4};
}
constexpr int64_t Int8Address(int32_t row, int32_t k, int32_t columns) {
  const int64_t block = row / kRowBlock;
  return block * kRowBlock * columns + static_cast<int64_t>(k / 4) * 64 + (row % kRowBlock) * 4 +
         k % 4;
}
// Index of a scale or zero.
constexpr int64_t GroupAddress(int32_t row, int32_t group_index, int32_t group_count) {
  return (static_cast<int64_t>(row / kRowBlock) * group_count + group_index) * kRowBlock +
         row % kRowBlock;
}
constexpr int64_t DenseAddress(int32_t row, int32_t k, int32_t columns) {
  return (static_cast<int64_t>(row / kRowBlock) * columns + k) * kRowBlock + row % kRowBlock;
}

}  // namespace nibble::layout
