// The AMX product over emulated tiles: the bits of the reference. The real tiles are covered by
// products_test where the machine has them.
#include <gtest/gtest.h>

#include <cstdio>

#include "tests/unit/kernels/amx_emulation.h"
#include "tests/unit/kernels/kernel_data.h"

namespace nibble::cpu {
namespace {

struct Shape {
  int32_t rows, columns, group, terms;
};

TEST(AmxTest, EmulatedTilesGiveTheBitsOfTheReference) {
  if (!IsaLevelSupported(IsaLevel::kAvx512Vnni)) {
    std::fprintf(stderr, "NOT RUN: AMX emulation (this machine lacks AVX-512 VNNI)\n");
    return;
  }
  Random random(1);
  constexpr int32_t kTokens = 67;
  for (const Shape& shape :
       {Shape{1, 32, 32, 1}, Shape{33, 288, 32, 1}, Shape{33, 288, 32, 2}, Shape{48, 64, 64, 2},
        Shape{50, 576, 64, 1}, Shape{80, 1600, 64, 1}, Shape{80, 1600, 64, 2},
        Shape{31, 128, 128, 1}, Shape{64, 1664, 128, 1}, Shape{64, 1664, 128, 2}}) {
    W4Data w(shape.rows, shape.columns, shape.group, ElementType::kF16, random);
    for (int64_t i = 0; i < w.q.size(); i += 5) w.q[i] = 15;
    w.Pack();
    Buffer<float> values =
        RandomFloats(static_cast<int64_t>(kTokens) * shape.columns, random, 3.0F);
    values[40 * shape.columns] = std::numeric_limits<float>::quiet_NaN();
    const ActivationData x(std::move(values), kTokens, shape.columns, shape.group, shape.terms);
    const Buffer<float> bias = RandomFloats(shape.rows, random);
    const int32_t blocks = layout::RowBlocks(shape.rows);
    const int64_t stride = shape.rows + 1;
    std::vector<float> expected(static_cast<size_t>(kTokens * stride), -5.0F);
    GetKernels(IsaLevel::kReference)
        .gemm_w4_int8(w.matrix, x.Ints(0, kTokens), {expected.data(), stride, bias.data()},
                      {0, blocks});
    for (const int32_t tokens : {0, 1, 15, 16, 17, 32, 33, 48, 49, 64, 67}) {
      std::vector<float> y(expected.size(), -5.0F);
      for (int32_t block = 0; block < blocks; block += 3) {
        GemmW4Int8AmxEmulated(w.matrix, x.Ints(0, tokens), {y.data(), stride, bias.data()},
                              {block, std::min(block + 3, blocks)});
      }
      const size_t used = static_cast<size_t>(tokens * stride);
      EXPECT_EQ(FirstDifference({y.data(), used}, {expected.data(), used}), -1)
          << shape.rows << " x " << shape.columns << " group " << shape.group << " tokens "
          << tokens;
      EXPECT_TRUE(used == y.size() || y[used] == -5.0F);
    }
  }
}

}  // namespace
}  // namespace nibble::cpu
