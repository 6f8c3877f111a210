// Packs logical matrices for the kernels. Rows beyond `rows` in the last block are padding.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernels.h"

namespace nibble::cpu {

// q [rows, columns] 0…15 -> nibbles (W4NibbleBytes).
void PackNibbles(const uint8_t* q, int32_t rows, int32_t columns, uint8_t* nibbles);
void UnpackNibbles(const uint8_t* nibbles, int32_t rows, int32_t columns, uint8_t* q);

// [rows, groups] -> [row block][group][16].
void PackZeros(const uint8_t* zeros, int32_t rows, int32_t groups, uint8_t* packed);
void PackScales(const float* scales, int32_t rows, int32_t groups, ElementType type, void* packed);

// w [rows, columns] -> one int8 scale per 32 columns: s = max|w| / 127.
void PackInt8(const float* w, int32_t rows, int32_t columns, uint8_t* values, float* scales);

// w [rows, columns] -> [row block][k][16] of `type` (exact where the values came from that type).
void PackDense(const float* w, int32_t rows, int32_t columns, ElementType type, void* packed);

// IEEE binary16 and bfloat16, round to nearest even.
[[nodiscard]] uint16_t FloatToHalf(float value);
[[nodiscard]] float HalfToFloat(uint16_t value);
[[nodiscard]] uint16_t FloatToBFloat(float value);
[[nodiscard]] float BFloatToFloat(uint16_t value);

}  // namespace nibble::cpu
