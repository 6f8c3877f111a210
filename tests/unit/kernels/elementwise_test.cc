// Quantization, norms, activations, RoPE and KV writes: equal bits at every level, and what they
// should be by fp64.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "tests/unit/kernels/kernel_data.h"

namespace nibble::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kGuard = -321.0F;

std::span<const float> Span(const Buffer<float>& x) {
  return {x.data(), static_cast<size_t>(x.size())};
}

// Finite values of every size, signed zeros and denormals.
Buffer<float> WildFloats(int64_t count, Random& random) {
  Buffer<float> values(count);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(random.Next());
    values[i] = std::bit_cast<float>(bits);
    if (!std::isfinite(values[i]) || i % 7 == 0) values[i] = i % 2 == 0 ? 0.0F : -0.0F;
  }
  return values;
}

struct Quantized {
  Quantized(const Kernels& kernels, const FloatRows& x, int32_t group, int32_t terms = 1)
      : values(static_cast<int64_t>(x.tokens) * terms * x.columns),
        scales(static_cast<int64_t>(x.tokens) * x.columns / group),
        sums(scales.size()) {
    kernels.quantize(x, {group, terms, values.data(), scales.data(), sums.data()});
  }
  Buffer<int8_t> values;
  Buffer<float> scales;
  Buffer<int32_t> sums;
};

void ExpectSameQuantized(const FloatRows& x, int32_t group, int32_t terms) {
  const Quantized expected(GetKernels(IsaLevel::kReference), x, group, terms);
  for (const IsaLevel level : RunnableLevels()) {
    const Quantized got(GetKernels(level), x, group, terms);
    for (int64_t i = 0; i < expected.values.size(); ++i) {
      ASSERT_EQ(got.values[i], expected.values[i])
          << IsaLevelName(level) << " group " << group << " at " << i;
    }
    for (int64_t i = 0; i < expected.sums.size(); ++i) {
      ASSERT_EQ(Bits(got.scales[i]), Bits(expected.scales[i])) << IsaLevelName(level);
      ASSERT_EQ(got.sums[i], expected.sums[i]) << IsaLevelName(level);
    }
  }
}

TEST(QuantizeTest, EveryLevelHasTheBitsOfTheReference) {
  Random random(1);
  for (const int32_t group : {32, 64, 128}) {
    for (const int32_t groups : {1, 2, 9}) {
      const int32_t columns = group * groups;
      const int64_t stride = columns + 7;
      const Buffer<float> plain = RandomFloats(5 * stride, random, 10.0F);
      const Buffer<float> wild = WildFloats(5 * stride, random);
      for (const float* values : {plain.data(), wild.data()}) {
        for (const int32_t terms : {1, 2}) {
          ExpectSameQuantized({.tokens = 5, .columns = columns, .values = values, .stride = stride},
                              group, terms);
        }
      }
    }
  }
}

TEST(QuantizeTest, IsWithinHalfAStepAndSumsUp) {
  Random random(2);
  const Buffer<float> x = RandomFloats(64 * 20, random, 5.0F);
  const Quantized q(GetKernels(IsaLevel::kReference),
                    {.tokens = 4, .columns = 320, .values = x.data(), .stride = 320}, 64);
  for (int64_t g = 0; g < 20; ++g) {
    int32_t sum = 0;
    int32_t largest = 0;
    for (int64_t k = g * 64; k < (g + 1) * 64; ++k) {
      EXPECT_NEAR(q.values[k] * q.scales[g], x[k], q.scales[g] * 0.50001);
      sum += q.values[k];
      largest = std::max(largest, std::abs(static_cast<int32_t>(q.values[k])));
    }
    EXPECT_EQ(q.sums[g], sum);
    EXPECT_EQ(largest, 127);
  }
}

TEST(QuantizeTest, TwoTermsAreWithinHalfASmallStepAndSumUp) {
  Random random(3);
  Buffer<float> x = RandomFloats(128 * 10, random, 5.0F);
  x[0] = 5.0F;  // the limits: 32512 = 127 * 256 + 0, and its negative
  x[128] = -5.0F;
  const Quantized q(GetKernels(IsaLevel::kReference),
                    {.tokens = 2, .columns = 640, .values = x.data(), .stride = 640}, 128, 2);
  EXPECT_EQ(q.values[0], 127);
  EXPECT_EQ(q.values[640], 0);
  EXPECT_EQ(q.values[128], -127);
  EXPECT_EQ(q.values[640 + 128], 0);
  for (int64_t g = 0; g < 10; ++g) {
    const int64_t token = g / 5;
    int32_t high_sum = 0;
    int32_t low_sum = 0;
    for (int64_t k = g % 5 * 128; k < (g % 5 + 1) * 128; ++k) {
      const int32_t high = q.values[token * 1280 + k];
      const int32_t low = q.values[token * 1280 + 640 + k];
      EXPECT_LE(std::abs(high), 127);
      // fp32 adds its own rounding to the half step.
      EXPECT_NEAR(static_cast<float>(256 * high + low) * q.scales[g], x[token * 640 + k],
                  q.scales[g] * 0.51);
      high_sum += high;
      low_sum += low;
    }
    EXPECT_EQ(q.sums[g] >> 16, high_sum);
    EXPECT_EQ(static_cast<int16_t>(q.sums[g] & 0xffff), low_sum);
  }
}

TEST(QuantizeTest, RoundsTiesToEven) {
  Buffer<float> x(32);
  x[0] = 127;  // the step is 1
  const float ties[] = {0.5F, 1.5F, 2.5F, -0.5F, -1.5F, -2.5F};
  for (int64_t i = 0; i < 6; ++i) x[i + 1] = ties[i];
  for (const IsaLevel level : RunnableLevels()) {
    const Quantized q(GetKernels(level),
                      {.tokens = 1, .columns = 32, .values = x.data(), .stride = 32}, 32);
    EXPECT_THAT(std::vector<int>(q.values.data() + 1, q.values.data() + 7),
                ::testing::ElementsAre(0, 2, 2, 0, -2, -2));
  }
}

TEST(QuantizeTest, ZeroAndNonFiniteGroupsAreMarked) {
  Buffer<float> x(32 * 6);
  x[32] = kNan;
  x[64] = kInfinity;
  x[64 + 5] = kNan;
  x[96] = -kInfinity;
  x[128] = 1e-31F;  // below 2^-100
  x[160] = 1e-29F;
  for (const IsaLevel level : RunnableLevels()) {
    const FloatRows rows = {.tokens = 1, .columns = 192, .values = x.data(), .stride = 192};
    const Quantized two(GetKernels(level), rows, 32, 2);
    EXPECT_EQ(two.values[160], 127);
    EXPECT_TRUE(std::isnan(two.scales[1]));
    for (int64_t i = 0; i < 160; ++i) EXPECT_EQ(two.values[i] | two.values[192 + i], 0);
    const Quantized q(GetKernels(level), rows, 32);
    EXPECT_EQ(q.scales[0], 0) << IsaLevelName(level);
    EXPECT_TRUE(std::isnan(q.scales[1]));
    EXPECT_TRUE(std::isnan(q.scales[2]));
    EXPECT_TRUE(std::isnan(q.scales[3]));
    EXPECT_EQ(q.scales[4], 0);
    EXPECT_GT(q.scales[5], 0);
    EXPECT_EQ(q.values[160], 127);
    for (int64_t i = 0; i < 160; ++i) EXPECT_EQ(q.values[i], 0);
  }
}

TEST(GroupSumsTest, SumInRisingOrder) {
  Random random(3);
  const Buffer<float> x = RandomFloats(3 * 200, random);
  Buffer<float> expected(6);
  for (int64_t i = 0; i < 6; ++i) {
    for (int64_t k = 0; k < 64; ++k) expected[i] += x[i / 2 * 200 + i % 2 * 64 + k];
  }
  for (const IsaLevel level : RunnableLevels()) {
    Buffer<float> sums(6);
    GetKernels(level).group_sums({.tokens = 3, .columns = 128, .values = x.data(), .stride = 200},
                                 64, sums.data());
    EXPECT_EQ(FirstDifference(Span(sums), Span(expected)), -1) << IsaLevelName(level);
  }
}

TEST(RmsNormTest, EveryLevelHasTheBitsOfTheReference) {
  Random random(4);
  for (const int32_t columns : {1, 8, 15, 16, 17, 63, 64, 65, 100, 576, 1000}) {
    const int64_t stride = columns + 3;
    const Buffer<float> x = RandomFloats(3 * stride, random, 20.0F);
    const Buffer<float> weight = RandomFloats(columns, random);
    const FloatRows rows = {.tokens = 3, .columns = columns, .values = x.data(), .stride = stride};
    const int64_t out_stride = columns + 2;
    std::vector<float> expected(static_cast<size_t>(3 * out_stride), kGuard);
    GetKernels(IsaLevel::kReference)
        .rms_norm(rows, weight.data(), 1e-5F, expected.data(), out_stride);
    for (int64_t t = 0; t < 3; ++t) {
      double squares = 0;
      for (int64_t k = 0; k < columns; ++k) squares += std::pow(x[t * stride + k], 2.0);
      for (int64_t k = 0; k < columns; ++k) {
        const double exact = x[t * stride + k] / std::sqrt(squares / columns + 1e-5) * weight[k];
        EXPECT_NEAR(expected[static_cast<size_t>(t * out_stride + k)], exact,
                    std::abs(exact) * 1e-6);
      }
    }
    for (const IsaLevel level : RunnableLevels()) {
      std::vector<float> out(expected.size(), kGuard);
      GetKernels(level).rms_norm(rows, weight.data(), 1e-5F, out.data(), out_stride);
      EXPECT_EQ(FirstDifference(out, expected), -1) << IsaLevelName(level) << " " << columns;
    }
  }
}

TEST(AddTest, AddsAllAndNoMore) {
  Random random(5);
  for (const int64_t count : {0, 1, 8, 15, 16, 31, 1000}) {
    const Buffer<float> y = RandomFloats(count + 1, random);
    for (const IsaLevel level : RunnableLevels()) {
      Buffer<float> x(count + 1);
      for (int64_t i = 0; i <= count; ++i) x[i] = static_cast<float>(i);
      GetKernels(level).add(x.data(), y.data(), count);
      for (int64_t i = 0; i < count; ++i) ASSERT_EQ(x[i], static_cast<float>(i) + y[i]);
      EXPECT_EQ(x[count], static_cast<float>(count)) << IsaLevelName(level);
    }
  }
}

// gate_up of one token -> out.
std::vector<float> Silu(IsaLevel level, const Buffer<float>& gate_up) {
  const int32_t columns = static_cast<int32_t>(gate_up.size() / 2);
  std::vector<float> out(static_cast<size_t>(columns));
  GetKernels(level).silu_mul(gate_up.data(), 1, columns, out.data());
  return out;
}

TEST(SiluMulTest, EveryLevelHasTheBitsOfTheReference) {
  Random random(6);
  for (const int32_t columns : {1, 15, 16, 172, 1536}) {
    for (const bool wild : {false, true}) {
      const Buffer<float> gate_up = wild ? WildFloats(4L * 2 * columns, random)
                                         : RandomFloats(4L * 2 * columns, random, 30.0F);
      std::vector<float> expected(static_cast<size_t>(4 * columns));
      GetKernels(IsaLevel::kReference).silu_mul(gate_up.data(), 4, columns, expected.data());
      for (const IsaLevel level : RunnableLevels()) {
        std::vector<float> out(expected.size());
        GetKernels(level).silu_mul(gate_up.data(), 4, columns, out.data());
        EXPECT_EQ(FirstDifference(out, expected), -1) << IsaLevelName(level) << " " << columns;
      }
    }
  }
}

// 1 / (1 + exp(-x)) by way of silu(x) = x * that: the relative error of exp shows below x = 0.
TEST(SiluMulTest, ExpIsWithinTwoUlps) {
  constexpr int32_t kCount = 87 * 1000;
  Buffer<float> gate_up(2L * kCount);
  for (int32_t i = 0; i < kCount; ++i) {
    gate_up[i] = -static_cast<float>(i) / 1000.0F - 0.0003F;
    gate_up[kCount + i] = 1.0F;
  }
  const std::vector<float> out = Silu(IsaLevel::kReference, gate_up);
  double worst = 0;
  for (int32_t i = 0; i < kCount; ++i) {
    const double x = gate_up[i];
    const double exact = x / (1 + std::exp(-x));
    worst = std::max(worst, std::abs(out[static_cast<size_t>(i)] / exact - 1));
  }
  EXPECT_LT(worst * 0x1p24, 4.0);  // exp 2 half-ulps, sum 1, quotient 1
}

TEST(SiluMulTest, ExtremesHaveTheirLimits) {
  Buffer<float> gate_up(2 * 6);
  const float gates[] = {100.0F, -100.0F, 3e38F, -3e38F, 0.0F, kNan};
  for (int64_t i = 0; i < 6; ++i) {
    gate_up[i] = gates[i];
    gate_up[6 + i] = 1.0F;
  }
  for (const IsaLevel level : RunnableLevels()) {
    const std::vector<float> out = Silu(level, gate_up);
    EXPECT_EQ(out[0], 100.0F);
    EXPECT_NEAR(out[1], 0.0F, 1e-30F);
    EXPECT_EQ(out[2], 3e38F);
    EXPECT_LE(std::abs(out[3]), 2.0F);  // exp is clamped at 2^127.5
    EXPECT_EQ(out[4], 0.0F);
    EXPECT_TRUE(std::isnan(out[5])) << IsaLevelName(level);
  }
}

TEST(RopeTest, RotatesHalvesEverywhereAlike) {
  Random random(7);
  for (const int32_t head_dim : {8, 16, 24, 64, 80, 128}) {
    const int32_t half = head_dim / 2;
    Buffer<float> cos(4L * half);
    Buffer<float> sin(4L * half);
    for (int64_t i = 0; i < cos.size(); ++i) {
      cos[i] = static_cast<float>(std::cos(0.37 * static_cast<double>(i)));
      sin[i] = static_cast<float>(std::sin(0.37 * static_cast<double>(i)));
    }
    const Buffer<float> x = RandomFloats(3L * head_dim + 1, random);
    std::vector<float> expected(x.data(), x.data() + x.size());
    GetKernels(IsaLevel::kReference)
        .rope(expected.data(), 3, head_dim, {cos.data(), sin.data()}, 2);
    EXPECT_EQ(expected.back(), x[x.size() - 1]);
    for (int64_t h = 0; h < 3; ++h) {
      for (int64_t i = 0; i < half; ++i) {
        const double a = x[h * head_dim + i];
        const double b = x[h * head_dim + half + i];
        const double c = cos[2 * half + i];
        const double s = sin[2 * half + i];
        EXPECT_NEAR(expected[static_cast<size_t>(h * head_dim + i)], a * c - b * s, 2e-7);
        EXPECT_NEAR(expected[static_cast<size_t>(h * head_dim + half + i)], b * c + a * s, 2e-7);
      }
    }
    for (const IsaLevel level : RunnableLevels()) {
      std::vector<float> out(x.data(), x.data() + x.size());
      GetKernels(level).rope(out.data(), 3, head_dim, {cos.data(), sin.data()}, 2);
      EXPECT_EQ(FirstDifference(out, expected), -1) << IsaLevelName(level) << " " << head_dim;
    }
  }
}

TEST(WriteKvTest, WritesOnePositionAndNothingElse) {
  Random random(8);
  for (const ElementType type : {ElementType::kF16, ElementType::kF32}) {
    for (const int32_t head_dim : {8, 24, 64, 80}) {
      constexpr int32_t kHeads = 3;
      Buffer<float> k = RandomFloats(static_cast<int64_t>(kHeads) * head_dim, random);
      const Buffer<float> v = RandomFloats(static_cast<int64_t>(kHeads) * head_dim, random);
      k[0] = 1e9F;   // beyond fp16
      k[1] = 1e-6F;  // a denormal in fp16
      k[2] = kNan;
      const int64_t entries = 2L * kHeads * head_dim * 16 * (type == ElementType::kF32 ? 2 : 1);
      Buffer<uint16_t> expected_k(entries);
      Buffer<uint16_t> expected_v(entries);
      for (const IsaLevel level : RunnableLevels()) {
        Buffer<uint16_t> keys(entries);
        Buffer<uint16_t> values(entries);
        GetKernels(level).write_kv({.keys = keys.data(),
                                    .values = values.data(),
                                    .type = type,
                                    .kv_heads = kHeads,
                                    .head_dim = head_dim},
                                   k.data(), v.data(), 1, 5);
        if (level == IsaLevel::kReference) {
          expected_k = std::move(keys);
          expected_v = std::move(values);
          continue;
        }
        for (int64_t i = 0; i < entries; ++i) {
          ASSERT_EQ(keys[i], expected_k[i]) << IsaLevelName(level) << " " << head_dim << " " << i;
          ASSERT_EQ(values[i], expected_v[i]) << IsaLevelName(level) << " " << head_dim << " " << i;
        }
      }
      if (type == ElementType::kF16) {
        const int64_t head = (kHeads + 1) * static_cast<int64_t>(head_dim) * 16;  // block 1, head 1
        EXPECT_EQ(expected_k[head + 7 * 16 + 5], FloatToHalf(k[head_dim + 7]));
        EXPECT_EQ(expected_v[head + 5 * head_dim + 7], FloatToHalf(v[head_dim + 7]));
        EXPECT_EQ(expected_k[kHeads * static_cast<int64_t>(head_dim) * 16 + 5], 0x7c00U);
      }
    }
  }
}

}  // namespace
}  // namespace nibble::cpu
