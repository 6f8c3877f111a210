// Matrix products: every level gives the bits of the reference whatever the batch and the split,
// and the reference is close to the product in fp64.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "tests/unit/kernels/kernel_data.h"

namespace nibble::cpu {
namespace {

constexpr float kGuard = -12345.0F;

// A product with everything bound but the tokens, the place of y and the row blocks.
using Product = std::function<void(const Kernels& kernels, int32_t first_token, int32_t tokens,
                                   const GemmOutput& y, BlockRange blocks)>;

struct Shape {
  int32_t rows;
  int32_t columns;
  int32_t group;
};

std::string Describe(const Shape& shape, IsaLevel level, int32_t tokens) {
  return std::string(IsaLevelName(level)) + " rows " + std::to_string(shape.rows) + " columns " +
         std::to_string(shape.columns) + " group " + std::to_string(shape.group) + " tokens " +
         std::to_string(tokens);
}

constexpr int32_t kTokens = 33;

// Runs the reference once for 33 tokens, then every level for several counts and splits: equal
// bits say that neither level, batch nor split matters. Columns of y past the rows stay untouched.
void ExpectSameBits(const Shape& shape, const float* bias, const Product& product) {
  const int64_t stride = shape.rows + 3;
  const int32_t blocks = layout::RowBlocks(shape.rows);
  const std::vector<float> untouched(static_cast<size_t>(kTokens * stride), kGuard);
  std::vector<float> expected = untouched;
  product(GetKernels(IsaLevel::kReference), 0, kTokens, {expected.data(), stride, bias},
          {0, blocks});
  for (int32_t t = 0; t < kTokens; ++t) {
    for (int64_t i = shape.rows; i < stride; ++i) {
      ASSERT_EQ(expected[static_cast<size_t>(t * stride + i)], kGuard);
    }
  }
  for (const IsaLevel level : RunnableLevels()) {
    if (level == IsaLevel::kReference) continue;
    const Kernels& kernels = GetKernels(level);
    for (const int32_t tokens : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33}) {
      std::vector<float> y = untouched;
      product(kernels, 0, tokens, {y.data(), stride, bias}, {0, blocks});
      const size_t used = static_cast<size_t>(tokens * stride);
      EXPECT_EQ(FirstDifference({y.data(), used}, {expected.data(), used}), -1)
          << Describe(shape, level, tokens);
      EXPECT_EQ(FirstDifference({y.data() + used, y.size() - used},
                                {untouched.data() + used, y.size() - used}),
                -1)
          << "touched rows past the last token: " << Describe(shape, level, tokens);
    }
    std::vector<float> y = untouched;
    for (int32_t token = 0; token < kTokens; token += 11) {  // tokens in three parts
      for (int32_t block = 0; block < blocks; block += 2) {  // rows in shares of two blocks
        product(kernels, token, 11, {y.data() + token * stride, stride, bias},
                {block, std::min(block + 2, blocks)});
      }
    }
    EXPECT_EQ(FirstDifference(y, expected), -1) << "split " << Describe(shape, level, kTokens);
  }
}

Product W4Int8(const W4Data& w, const ActivationData& x) {
  return
      [&](const Kernels& kernels, int32_t first, int32_t tokens, const GemmOutput& y,
          BlockRange blocks) { kernels.gemm_w4_int8(w.matrix, x.Ints(first, tokens), y, blocks); };
}

Product W4Float(const W4Data& w, const ActivationData& x) {
  return [&](const Kernels& kernels, int32_t first, int32_t tokens, const GemmOutput& y,
             BlockRange blocks) {
    kernels.gemm_w4_float(w.matrix, x.Floats(first, tokens), y, blocks);
  };
}

Product HeadInt8(const Int8Data& w, const ActivationData& x) {
  return [&](const Kernels& kernels, int32_t first, int32_t tokens, const GemmOutput& y,
             BlockRange blocks) { kernels.gemm_int8(w.matrix, x.Ints(first, tokens), y, blocks); };
}

Product Dense(const DenseData& w, const ActivationData& x) {
  return
      [&](const Kernels& kernels, int32_t first, int32_t tokens, const GemmOutput& y,
          BlockRange blocks) { kernels.gemm_dense(w.matrix, x.Floats(first, tokens), y, blocks); };
}

// Rows that are no multiple of 16, one and many groups, columns past one panel.
const Shape kW4Shapes[] = {{1, 32, 32},    {15, 64, 64},    {16, 128, 128},
                           {17, 288, 32},  {33, 576, 64},   {48, 1152, 128},
                           {66, 1568, 32}, {100, 1600, 64}, {80, 1664, 128}};

TEST(ProductsTest, W4Int8HasTheBitsOfTheReference) {
  Random random(1);
  for (const Shape& shape : kW4Shapes) {
    for (const ElementType scale_type : {ElementType::kF16, ElementType::kF32}) {
      const W4Data w(shape.rows, shape.columns, shape.group, scale_type, random);
      const Buffer<float> bias = RandomFloats(shape.rows, random);
      for (const int32_t terms : {1, 2}) {
        const ActivationData x(
            RandomFloats(static_cast<int64_t>(kTokens) * shape.columns, random, 3.0F), kTokens,
            shape.columns, shape.group, terms);
        ExpectSameBits(shape, terms == 1 ? nullptr : bias.data(), W4Int8(w, x));
        ExpectSameBits(shape, terms == 1 ? bias.data() : nullptr, W4Int8(w, x));
      }
    }
  }
}

TEST(ProductsTest, W4FloatHasTheBitsOfTheReference) {
  Random random(2);
  for (const Shape& shape : kW4Shapes) {
    for (const ElementType scale_type : {ElementType::kF16, ElementType::kF32}) {
      const W4Data w(shape.rows, shape.columns, shape.group, scale_type, random);
      const ActivationData x(
          RandomFloats(static_cast<int64_t>(kTokens) * shape.columns, random, 3.0F), kTokens,
          shape.columns, shape.group);
      const Buffer<float> bias = RandomFloats(shape.rows, random);
      ExpectSameBits(shape, bias.data(), W4Float(w, x));
    }
  }
}

TEST(ProductsTest, Int8HasTheBitsOfTheReference) {
  Random random(3);
  for (const Shape& shape :
       {Shape{1, 32, 32}, Shape{31, 288, 32}, Shape{100, 576, 32}, Shape{65, 1600, 32}}) {
    const Int8Data w(shape.rows, shape.columns, random);
    const ActivationData x(RandomFloats(static_cast<int64_t>(kTokens) * shape.columns, random),
                           kTokens, shape.columns, shape.group);
    const Buffer<float> bias = RandomFloats(shape.rows, random);
    ExpectSameBits(shape, bias.data(), HeadInt8(w, x));
  }
}

TEST(ProductsTest, DenseHasTheBitsOfTheReference) {
  Random random(4);
  for (const Shape& shape :
       {Shape{1, 1, 1}, Shape{31, 172, 1}, Shape{100, 64, 1}, Shape{65, 333, 1}}) {
    for (const ElementType type : {ElementType::kF16, ElementType::kBF16, ElementType::kF32}) {
      const DenseData w(shape.rows, shape.columns, type, random);
      const ActivationData x(RandomFloats(static_cast<int64_t>(kTokens) * shape.columns, random),
                             kTokens, shape.columns, shape.group);
      const Buffer<float> bias = RandomFloats(shape.rows, random);
      ExpectSameBits(shape, bias.data(), Dense(w, x));
    }
  }
}

// `x` in two terms, where every low is -128: what no highs of 127 come with, but sums widest.
ActivationData LowestTwoTerms(const ActivationData& x, int32_t columns, int32_t group) {
  Buffer<float> copy(x.x.size());
  std::memcpy(copy.data(), x.x.data(), sizeof(float) * static_cast<size_t>(copy.size()));
  ActivationData two(std::move(copy), kTokens, columns, group, 2);
  for (int64_t t = 0; t < kTokens; ++t) {
    std::memset(two.values.data() + (2 * t + 1) * columns, 0x80, static_cast<size_t>(columns));
  }
  for (int64_t g = 0; g < two.sums.size(); ++g) {
    two.sums[g] = (two.sums[g] >> 16) * 65536 + ((-128 * group) & 0xffff);
  }
  return two;
}

// The largest sums that 4-bit weights and 8-bit activations can make, in both directions: a kernel
// that adds them in too few bits saturates here.
TEST(ProductsTest, ExtremeValuesDoNotSaturate) {
  Random random(5);
  for (const Shape& shape : {Shape{32, 128, 32}, Shape{32, 192, 64}, Shape{32, 256, 128}}) {
    W4Data w(shape.rows, shape.columns, shape.group, ElementType::kF32, random);
    std::memset(w.q.data(), 15, static_cast<size_t>(w.q.size()));
    for (int64_t i = 0; i < w.z.size(); ++i) w.z[i] = i % 2 == 0 ? 0 : 15;
    w.Pack();
    for (const int pattern : {0, 1, 2}) {
      Buffer<float> values(static_cast<int64_t>(kTokens) * shape.columns);
      for (int64_t i = 0; i < values.size(); ++i) {
        values[i] = pattern == 0 || (pattern == 2 && i % 3 == 0) ? 127.0F : -127.0F;
      }
      const ActivationData x(std::move(values), kTokens, shape.columns, shape.group);
      ASSERT_EQ(std::abs(x.values[0]), 127);
      ExpectSameBits(shape, nullptr, W4Int8(w, x));
      ExpectSameBits(shape, nullptr, W4Int8(w, LowestTwoTerms(x, shape.columns, shape.group)));

      Int8Data head(shape.rows, shape.columns, random);
      for (int64_t i = 0; i < head.values.size(); ++i) {
        head.values[i] = i % 64 < 32 ? 0 : 255;  // -128 and 127
      }
      Buffer<float> copy(x.x.size());
      std::memcpy(copy.data(), x.x.data(), sizeof(float) * static_cast<size_t>(copy.size()));
      const ActivationData x32(std::move(copy), kTokens, shape.columns, layout::kInt8Group);
      ExpectSameBits({shape.rows, shape.columns, layout::kInt8Group}, nullptr, HeadInt8(head, x32));
    }
  }
}

TEST(ProductsTest, GroupsOfZerosGiveZero) {
  Random random(6);
  const Shape shape = {20, 192, 64};
  const W4Data w(shape.rows, shape.columns, shape.group, ElementType::kF16, random);
  Buffer<float> values(static_cast<int64_t>(kTokens) * shape.columns);
  for (int64_t i = 0; i < values.size(); i += 3) values[i] = i % 2 == 0 ? 1e-38F : -0.0F;
  const ActivationData x(std::move(values), kTokens, shape.columns, shape.group);
  for (const IsaLevel level : RunnableLevels()) {
    std::vector<float> y(static_cast<size_t>(kTokens * shape.rows), kGuard);
    GetKernels(level).gemm_w4_int8(w.matrix, x.Ints(0, kTokens), {y.data(), shape.rows, nullptr},
                                   {0, layout::RowBlocks(shape.rows)});
    EXPECT_THAT(y, ::testing::Each(0.0F)) << IsaLevelName(level);
  }
}

TEST(ProductsTest, NanAndInfinityStayInTheirToken) {
  Random random(7);
  const Shape shape = {35, 192, 64};
  const W4Data w4(shape.rows, shape.columns, shape.group, ElementType::kF16, random);
  const DenseData dense(shape.rows, shape.columns, ElementType::kF16, random);
  const Buffer<float> clean = RandomFloats(static_cast<int64_t>(kTokens) * shape.columns, random);
  Buffer<float> dirty(clean.size());
  std::memcpy(dirty.data(), clean.data(), sizeof(float) * static_cast<size_t>(clean.size()));
  dirty[5 * shape.columns + 70] = std::numeric_limits<float>::quiet_NaN();
  dirty[6 * shape.columns + 3] = std::numeric_limits<float>::infinity();
  dirty[7 * shape.columns + 191] = -std::numeric_limits<float>::infinity();
  const ActivationData x(std::move(dirty), kTokens, shape.columns, shape.group);
  Buffer<float> copy(x.x.size());
  std::memcpy(copy.data(), x.x.data(), sizeof(float) * static_cast<size_t>(copy.size()));
  const ActivationData x2(std::move(copy), kTokens, shape.columns, shape.group, 2);
  for (const Product& product : {W4Int8(w4, x), W4Int8(w4, x2), W4Float(w4, x), Dense(dense, x)}) {
    ExpectSameBits(shape, nullptr, product);
    std::vector<float> y(static_cast<size_t>(kTokens * shape.rows));
    product(GetKernels(IsaLevel::kReference), 0, kTokens, {y.data(), shape.rows, nullptr},
            {0, layout::RowBlocks(shape.rows)});
    for (int32_t t = 0; t < kTokens; ++t) {
      const bool is_dirty = t >= 5 && t <= 7;
      for (int32_t r = 0; r < shape.rows; ++r) {
        EXPECT_EQ(std::isfinite(y[static_cast<size_t>(t * shape.rows + r)]), !is_dirty)
            << "token " << t << " row " << r;
      }
    }
  }
}

// ---- Against fp64 ----------------------------------------------------------------------------

TEST(ProductsTest, W4FloatIsTheProductOfTheDequantizedMatrix) {
  Random random(8);
  for (const Shape& shape : kW4Shapes) {
    const W4Data w(shape.rows, shape.columns, shape.group, ElementType::kF16, random);
    const ActivationData x(RandomFloats(4L * shape.columns, random, 3.0F), 4, shape.columns,
                           shape.group);
    std::vector<float> y(static_cast<size_t>(4 * shape.rows));
    W4Float(w, x)(GetKernels(IsaLevel::kReference), 0, 4, {y.data(), shape.rows, nullptr},
                  {0, layout::RowBlocks(shape.rows)});
    for (int64_t t = 0; t < 4; ++t) {
      for (int64_t r = 0; r < shape.rows; ++r) {
        double exact = 0;
        double magnitude = 0;  // of the terms that are added: q * x * s and z * x * s
        for (int64_t k = 0; k < shape.columns; ++k) {
          const double x_value = x.x[t * shape.columns + k];
          exact += w.Weight(r, k) * x_value;
          magnitude +=
              30 * w.s[r * (shape.columns / shape.group) + k / shape.group] * std::abs(x_value);
        }
        // One rounding of 2^-24 per addition in a group, and one per group.
        const double additions = shape.group + shape.columns / shape.group;
        EXPECT_NEAR(y[static_cast<size_t>(t * shape.rows + r)], exact,
                    magnitude * additions * 0x1p-24);
      }
    }
  }
}

void ExpectWithinSteps(const Shape& shape, const W4Data& w, int32_t terms, Random& random) {
  const int32_t groups = shape.columns / shape.group;
  const ActivationData x(RandomFloats(4L * shape.columns, random, 3.0F), 4, shape.columns,
                         shape.group, terms);
  std::vector<float> y(static_cast<size_t>(4 * shape.rows));
  W4Int8(w, x)(GetKernels(IsaLevel::kReference), 0, 4, {y.data(), shape.rows, nullptr},
               {0, layout::RowBlocks(shape.rows)});
  for (int64_t t = 0; t < 4; ++t) {
    for (int64_t r = 0; r < shape.rows; ++r) {
      double exact = 0;      // with the activations as given
      double quantized = 0;  // with the activations as quantized
      double bound = 0;
      double magnitude = 0;
      for (int64_t k = 0; k < shape.columns; ++k) {
        const double step = x.scales[t * groups + k / shape.group];
        exact += w.Weight(r, k) * x.x[t * shape.columns + k];
        quantized += w.Weight(r, k) * step * x.Value(t, k);
        bound += std::abs(w.Weight(r, k)) * step * 0.5;
        magnitude += std::abs(w.Weight(r, k)) * step * (terms == 1 ? 127 : 32512);
      }
      const double got = y[static_cast<size_t>(t * shape.rows + r)];
      const double rounding = magnitude * (groups + 2) * 0x1p-24;
      EXPECT_NEAR(got, quantized, rounding);
      // fp32 takes x * (limit / max) to within a 2^-22nd of the limit.
      EXPECT_NEAR(got, exact, bound * (terms == 1 ? 1.0001 : 1.02) + rounding);
    }
  }
}

TEST(ProductsTest, W4Int8ErrsByTheStepOfTheActivationsOnly) {
  Random random(9);
  for (const Shape& shape : kW4Shapes) {
    const W4Data w(shape.rows, shape.columns, shape.group, ElementType::kF16, random);
    for (const int32_t terms : {1, 2}) ExpectWithinSteps(shape, w, terms, random);
  }
}

TEST(ProductsTest, Int8HeadErrsByItsStepsOnly) {
  Random random(10);
  const Shape shape = {40, 576, 32};
  const Int8Data w(shape.rows, shape.columns, random);
  const ActivationData x(RandomFloats(4L * shape.columns, random), 4, shape.columns, shape.group);
  std::vector<float> y(static_cast<size_t>(4 * shape.rows));
  HeadInt8(w, x)(GetKernels(IsaLevel::kReference), 0, 4, {y.data(), shape.rows, nullptr},
                 {0, layout::RowBlocks(shape.rows)});
  for (int64_t t = 0; t < 4; ++t) {
    for (int64_t r = 0; r < shape.rows; ++r) {
      double exact = 0;
      double bound = 0;
      for (int64_t k = 0; k < shape.columns; ++k) {
        const double a = w.w[r * shape.columns + k];
        const double b = x.x[t * shape.columns + k];
        exact += a * b;
        bound += (std::abs(a) + std::abs(b) + 0.01) * 0.5 / 127;  // both in [-1, 1]
      }
      EXPECT_NEAR(y[static_cast<size_t>(t * shape.rows + r)], exact, bound);
    }
  }
}

TEST(ProductsTest, DenseIsTheProduct) {
  Random random(11);
  const Shape shape = {40, 333, 1};
  for (const ElementType type : {ElementType::kF16, ElementType::kBF16, ElementType::kF32}) {
    const DenseData w(shape.rows, shape.columns, type, random);
    const ActivationData x(RandomFloats(4L * shape.columns, random), 4, shape.columns, 1);
    std::vector<float> y(static_cast<size_t>(4 * shape.rows));
    Dense(w, x)(GetKernels(IsaLevel::kReference), 0, 4, {y.data(), shape.rows, nullptr},
                {0, layout::RowBlocks(shape.rows)});
    for (int64_t t = 0; t < 4; ++t) {
      for (int64_t r = 0; r < shape.rows; ++r) {
        double exact = 0;
        double magnitude = 0;
        for (int64_t k = 0; k < shape.columns; ++k) {
          const double term =
              static_cast<double>(w.w[r * shape.columns + k]) * x.x[t * shape.columns + k];
          exact += term;
          magnitude += std::abs(term);
        }
        EXPECT_NEAR(y[static_cast<size_t>(t * shape.rows + r)], exact,
                    magnitude * shape.columns * 0x1p-24);
      }
    }
  }
}

}  // namespace
}  // namespace nibble::cpu
