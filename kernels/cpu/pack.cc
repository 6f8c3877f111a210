#include "kernels/cpu/pack.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

namespace nibble::cpu {
namespace {

using layout::kInt8Group;
using layout::kRowBlock;

uint16_t FloatToType(float value, ElementType type) {
  return type == ElementType::kBF16 ? FloatToBFloat(value) : FloatToHalf(value);
}

void StoreElement(void* base, int64_t index, float value, ElementType type) {
  if (type == ElementType::kF32) {
    static_cast<float*>(base)[index] = value;
  } else {
    static_cast<uint16_t*>(base)[index] = FloatToType(value, type);
  }
}

}  // namespace

void PackNibbles(const uint8_t* q, int32_t rows, int32_t columns, uint8_t* nibbles) {
  std::memset(nibbles, 0, static_cast<size_t>(layout::W4NibbleBytes(rows, columns)));
  for (int32_t row = 0; row < rows; ++row) {
    const uint8_t* source = q + static_cast<int64_t>(row) * columns;
    for (int32_t k = 0; k < columns; ++k) {
      const layout::NibbleAddress at = layout::W4Address(row, k, columns);
      nibbles[at.byte] = static_cast<uint8_t>(nibbles[at.byte] | ((source[k] & 15) << at.shift));
    }
  }
}

void UnpackNibbles(const uint8_t* nibbles, int32_t rows, int32_t columns, uint8_t* q) {
  for (int32_t row = 0; row < rows; ++row) {
    uint8_t* target = q + static_cast<int64_t>(row) * columns;
    for (int32_t k = 0; k < columns; ++k) {
      const layout::NibbleAddress at = layout::W4Address(row, k, columns);
      target[k] = static_cast<uint8_t>((nibbles[at.byte] >> at.shift) & 15);
    }
  }
}

void PackZeros(const uint8_t* zeros, int32_t rows, int32_t groups, uint8_t* packed) {
  std::memset(packed, 0, static_cast<size_t>(layout::RowBlocks(rows)) * kRowBlock * groups);
  for (int32_t row = 0; row < rows; ++row) {
    for (int32_t g = 0; g < groups; ++g) {
      packed[layout::GroupAddress(row, g, groups)] = zeros[static_cast<int64_t>(row) * groups + g];
    }
  }
}

void PackScales(const float* scales, int32_t rows, int32_t groups, ElementType type, void* packed) {
  const size_t element = type == ElementType::kF32 ? sizeof(float) : sizeof(uint16_t);
  std::memset(packed, 0,
              static_cast<size_t>(layout::RowBlocks(rows)) * kRowBlock * groups * element);
  for (int32_t row = 0; row < rows; ++row) {
    for (int32_t g = 0; g < groups; ++g) {
      StoreElement(packed, layout::GroupAddress(row, g, groups),
                   scales[static_cast<int64_t>(row) * groups + g], type);
    }
  }
}

void PackInt8(const float* w, int32_t rows, int32_t columns, uint8_t* values, float* scales) {
  const int32_t groups = columns / kInt8Group;
  std::memset(values, 128, static_cast<size_t>(layout::Int8Bytes(rows, columns)));
  std::memset(scales, 0,
              static_cast<size_t>(layout::GroupEntries(rows, columns, kInt8Group)) * sizeof(float));
  for (int32_t row = 0; row < rows; ++row) {
    for (int32_t g = 0; g < groups; ++g) {
      const float* source = w + static_cast<int64_t>(row) * columns + g * kInt8Group;
      float largest = 0;
      for (int32_t k = 0; k < kInt8Group; ++k) largest = std::max(largest, std::fabs(source[k]));
      const float scale = largest / 127.0F;
      scales[layout::GroupAddress(row, g, groups)] = scale;
      for (int32_t k = 0; k < kInt8Group && scale > 0; ++k) {
        const float rounded = std::clamp(std::nearbyint(source[k] / scale), -127.0F, 127.0F);
        values[layout::Int8Address(row, g * kInt8Group + k, columns)] =
            static_cast<uint8_t>(static_cast<int32_t>(rounded) + 128);
      }
    }
  }
}

void PackDense(const float* w, int32_t rows, int32_t columns, ElementType type, void* packed) {
  const size_t element = type == ElementType::kF32 ? sizeof(float) : sizeof(uint16_t);
  std::memset(packed, 0, static_cast<size_t>(layout::DenseEntries(rows, columns)) * element);
  for (int32_t row = 0; row < rows; ++row) {
    for (int32_t k = 0; k < columns; ++k) {
      StoreElement(packed, layout::DenseAddress(row, k, columns),
                   w[static_cast<int64_t>(row) * columns + k], type);
    }
  }
}

uint16_t FloatToHalf(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) {  // NaN: quiet, upper payload bits kept, as the hardware does
    return static_cast<uint16_t>(sign | 0x7e00U | ((magnitude >> 13) & 0x1ffU));
  }
  if (magnitude >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);  // >= 65520: inf
  if (magnitude < 0x38800000U) {  // below 2^-14: adding 0.5 leaves the denormal's bits, rounded
    const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000U));
  }
  const uint32_t odd = (magnitude >> 13) & 1U;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000U + 0xfffU + odd) >> 13));
}

float HalfToFloat(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000U) << 16;
  const uint32_t magnitude = value & 0x7fffU;
  if (magnitude > 0x7c00U) {
    return std::bit_cast<float>(sign | 0x7fc00000U | (magnitude << 13));
  }
  if (magnitude == 0x7c00U) return std::bit_cast<float>(sign | 0x7f800000U);
  if (magnitude < 0x400U) {
    const float denormal = static_cast<float>(magnitude) * 0x1p-24F;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(denormal));
  }
  return std::bit_cast<float>(sign | ((magnitude << 13) + 0x38000000U));
}

uint16_t FloatToBFloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

float BFloatToFloat(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

}  // namespace nibble::cpu
