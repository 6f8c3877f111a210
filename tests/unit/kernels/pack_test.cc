// Packed layouts and 16-bit floats.
#include "kernels/cpu/pack.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <set>

#include "tests/unit/kernels/kernel_data.h"

namespace nibble::cpu {
namespace {

TEST(PackTest, NibblesComeBackForAnyRowCount) {
  Random random(1);
  for (const int32_t rows : {1, 15, 16, 17, 50}) {
    for (const int32_t columns : {32, 64, 576, 18944}) {
      Buffer<uint8_t> q(static_cast<int64_t>(rows) * columns);
      for (int64_t i = 0; i < q.size(); ++i) q[i] = static_cast<uint8_t>(random.Below(16));
      Buffer<uint8_t> packed(layout::W4NibbleBytes(rows, columns));
      PackNibbles(q.data(), rows, columns, packed.data());
      Buffer<uint8_t> back(q.size());
      UnpackNibbles(packed.data(), rows, columns, back.data());
      EXPECT_EQ(std::memcmp(back.data(), q.data(), static_cast<size_t>(q.size())), 0)
          << rows << " x " << columns;
    }
  }
}

// The picture in kernels/layout/cpu_w4.h: 64 bytes hold 16 rows x 8 k, byte 4 * row + j has k = j
// in its low and k = j + 4 in its high nibble.
TEST(PackTest, NibblesLieAsDrawn) {
  Buffer<uint8_t> q(32 * 64);
  q[3 * 64 + 10] = 5;         // row 3, k 10: second vector, j = 2, low
  q[(16 + 7) * 64 + 61] = 9;  // row 7 of block 1, k 61: vector 7, j = 1, high
  Buffer<uint8_t> packed(layout::W4NibbleBytes(32, 64));
  PackNibbles(q.data(), 32, 64, packed.data());
  EXPECT_EQ(packed[64 + 4 * 3 + 2], 5);
  EXPECT_EQ(packed[8 * 64 + 7 * 64 + 4 * 7 + 1], 9 << 4);
}

TEST(PackTest, EveryElementHasAPlaceOfItsOwn) {
  std::set<int64_t> nibbles;
  std::set<int64_t> bytes;
  std::set<int64_t> dense;
  for (int32_t row = 0; row < 48; ++row) {
    for (int32_t k = 0; k < 96; ++k) {
      const layout::NibbleAddress at = layout::W4Address(row, k, 96);
      nibbles.insert(at.byte * 2 + at.shift / 4);
      bytes.insert(layout::Int8Address(row, k, 96));
      dense.insert(layout::DenseAddress(row, k, 96));
    }
  }
  for (const std::set<int64_t>& places : {nibbles, bytes, dense}) {
    EXPECT_EQ(places.size(), 48U * 96U);
    EXPECT_EQ(*places.begin(), 0);
    EXPECT_EQ(*places.rbegin(), 48 * 96 - 1);
  }
}

TEST(PackTest, RowsPastTheEndAreZero) {
  Random random(2);
  const W4Data w(17, 64, 32, ElementType::kF16, random);
  const int64_t second = 16 * 64 / 2;  // bytes of block 0
  for (int64_t i = 0; i < second; ++i) {
    if (i % 64 >= 4) {
      EXPECT_EQ(w.nibbles[second + i], 0);
    }
  }
  for (int64_t i = 0; i < 32; ++i) {
    if (i % 16 >= 1) {
      EXPECT_EQ(w.zeros[32 + i], 0);
      EXPECT_EQ(w.scales[32 + i], 0);
    }
  }
}

TEST(PackTest, Int8IsWithinHalfAStepAndNeverMinus128) {
  Random random(3);
  Int8Data w(20, 64, random);
  for (int32_t row = 0; row < 20; ++row) {
    for (int32_t k = 0; k < 64; ++k) {
      const int32_t value = w.values[layout::Int8Address(row, k, 64)] - 128;
      const float scale = w.scales[layout::GroupAddress(row, k / 32, 2)];
      EXPECT_GE(value, -127);
      EXPECT_NEAR(static_cast<float>(value) * scale, w.w[row * 64 + k], scale * 0.5001F);
    }
  }
  Buffer<float> zeros(32);
  Buffer<uint8_t> values(layout::Int8Bytes(1, 32));
  Buffer<float> scales(16);
  PackInt8(zeros.data(), 1, 32, values.data(), scales.data());
  EXPECT_EQ(values[0], 128);
  EXPECT_EQ(scales[0], 0);
}

// ---- binary16 and bfloat16, against the compiler's own arithmetic ------------------------------

TEST(HalfTest, EveryHalfBecomesTheFloatOfThatValue) {
  for (uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float expected = static_cast<float>(std::bit_cast<_Float16>(half));
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(HalfToFloat(half)));
    } else {
      EXPECT_EQ(Bits(HalfToFloat(half)), Bits(expected)) << bits;
      EXPECT_EQ(FloatToHalf(expected), half) << bits;
    }
  }
}

TEST(HalfTest, RoundsLikeTheCompiler) {
  Random random(4);
  for (int i = 0; i < 2000000; ++i) {
    // All exponents that matter to a half, and the neighbours of ties.
    const uint32_t exponent = 96 + random.Below(52);
    uint32_t bits = static_cast<uint32_t>(random.Next());
    bits = (bits & 0x807fffffU) | (exponent << 23);
    if (i % 2 == 0) bits = (bits & 0xffffe000U) + 0x1000U + (random.Below(3) - 1);
    const float value = std::bit_cast<float>(bits);
    ASSERT_EQ(FloatToHalf(value), std::bit_cast<uint16_t>(static_cast<_Float16>(value))) << bits;
  }
  EXPECT_EQ(FloatToHalf(65519.996F), 0x7bffU);
  EXPECT_EQ(FloatToHalf(65520.0F), 0x7c00U);
  EXPECT_EQ(FloatToHalf(-1e-8F), 0x8000U);
}

TEST(BFloatTest, RoundsToTheNearestEven) {
  Random random(5);
  for (int i = 0; i < 1000000; ++i) {
    const float value = std::bit_cast<float>(static_cast<uint32_t>(random.Next()));
    if (!std::isfinite(value)) continue;
    const uint16_t got = FloatToBFloat(value);
    const float near = BFloatToFloat(got);
    if (std::isinf(near)) continue;  // rounded past the largest
    const float below = BFloatToFloat(static_cast<uint16_t>(got - 1));
    const float above = BFloatToFloat(static_cast<uint16_t>(got + 1));
    const double error = std::abs(static_cast<double>(near) - value);
    for (const float other : {below, above}) {
      if (!std::isfinite(other)) continue;
      const double other_error = std::abs(static_cast<double>(other) - value);
      ASSERT_TRUE(error < other_error || (error == other_error && got % 2 == 0)) << value;
    }
  }
  EXPECT_EQ(FloatToBFloat(std::bit_cast<float>(0x7f800001U)) & 0x7fffU, 0x7fc0U);  // NaN stays NaN
}

}  // namespace
}  // namespace nibble::cpu
