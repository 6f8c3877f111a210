// A packed matrix multiplies as its logical form says, whichever way it is packed.
#include "worker/execution/cpu/packed_matrix.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cpu/pack.h"
#include "worker/execution/cpu/matrix_input.h"

namespace nibble::execution {
namespace {

using weights::FloatType;
using weights::LogicalLinear;

constexpr int32_t kTokens = 6;

LogicalLinear RandomLinear(int32_t rows, int32_t columns, int32_t group, FloatType type) {
  std::mt19937 random(static_cast<uint32_t>(rows * columns + group));
  std::normal_distribution<float> normal;
  LogicalLinear linear;
  linear.rows = rows;
  linear.columns = columns;
  linear.group_size = group;
  linear.stored_type = type;
  const auto count = static_cast<size_t>(rows) * static_cast<size_t>(columns);
  if (group == 0) {
    for (size_t i = 0; i < count; ++i) {
      const float value = normal(random);
      linear.dense.push_back(type == FloatType::kF16 ? cpu::HalfToFloat(cpu::FloatToHalf(value))
                             : type == FloatType::kBF16
                                 ? cpu::BFloatToFloat(cpu::FloatToBFloat(value))
                                 : value);
    }
  } else {
    for (size_t i = 0; i < count; ++i) linear.q.push_back(static_cast<uint8_t>(random() % 16));
    for (size_t i = 0; i < count / static_cast<size_t>(group); ++i) {
      linear.zeros.push_back(static_cast<uint8_t>(random() % 16));
      linear.scales.push_back(
          cpu::HalfToFloat(cpu::FloatToHalf(0.01f + 0.02f * static_cast<float>(random() % 7))));
    }
  }
  for (int32_t i = 0; i < rows; ++i) linear.bias.push_back(normal(random));
  return linear;
}

std::vector<float> RandomRows(int32_t columns) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<size_t>(kTokens) * static_cast<size_t>(columns));
  for (float& value : rows) value = normal(random);
  return rows;
}

// y = W x + bias in float64.
std::vector<double> Expected(const LogicalLinear& linear, const std::vector<float>& x) {
  const std::vector<float> w = weights::Dequantize(linear);
  std::vector<double> y;
  for (size_t token = 0; token < kTokens; ++token) {
    for (size_t row = 0; row < static_cast<size_t>(linear.rows); ++row) {
      double sum = linear.bias.empty() ? 0.0 : static_cast<double>(linear.bias[row]);
      for (size_t k = 0; k < static_cast<size_t>(linear.columns); ++k) {
        const auto columns = static_cast<size_t>(linear.columns);
        sum +=
            static_cast<double>(w[row * columns + k]) * static_cast<double>(x[token * columns + k]);
      }
      y.push_back(sum);
    }
  }
  return y;
}

// Converts and multiplies as one thread of the executor does.
std::vector<float> Multiply(const PackedMatrix& matrix, const std::vector<float>& x) {
  const cpu::Kernels& kernels = cpu::GetKernels(cpu::IsaLevel::kReference);
  const auto columns = static_cast<size_t>(matrix.columns());
  std::vector<int8_t> values(2 * kTokens * columns);
  std::vector<float> scales(kTokens * columns);
  std::vector<int32_t> sums(kTokens * columns);
  Buffers buffers;
  buffers.shared = {.values = values.data(), .scales = scales.data(), .sums = sums.data()};
  ThreadTeam team(1, Duration::zero());
  const InputConverter converter(&kernels, &team, &buffers);
  const MatrixInput input = converter.Convert(0, matrix.input_form(),
                                              {.tokens = kTokens,
                                               .columns = matrix.columns(),
                                               .values = x.data(),
                                               .stride = matrix.columns()},
                                              InputConverter::Rows::kReady);
  std::vector<float> y(static_cast<size_t>(kTokens) * static_cast<size_t>(matrix.rows()));
  // In two pieces, as two threads would.
  const int32_t middle = matrix.row_blocks() / 2;
  matrix.Multiply(kernels, input, y.data(), matrix.rows(), {0, middle});
  matrix.Multiply(kernels, input, y.data(), matrix.rows(), {middle, matrix.row_blocks()});
  return y;
}

void ExpectNear(const std::vector<float>& got, const std::vector<double>& want, double tolerance) {
  ASSERT_EQ(got.size(), want.size());
  double squares = 0;
  for (const double value : want) squares += value * value;
  const double typical = std::sqrt(squares / static_cast<double>(want.size()));
  for (size_t i = 0; i < want.size(); ++i) {
    EXPECT_NEAR(static_cast<double>(got[i]), want[i], tolerance * typical) << i;
  }
}

TEST(PackedMatrixTest, QuantizedMatricesMultiply) {
  for (const int32_t group : {32, 64, 128}) {
    for (const FloatType type : {FloatType::kF16, FloatType::kF32}) {
      const LogicalLinear linear = RandomLinear(41, 256, group, type);
      const std::vector<float> x = RandomRows(256);
      Arena arena;
      const PackedMatrix exact = PackedMatrix::Pack(linear, 0, &arena);
      EXPECT_EQ(exact.input_form().kind, InputKind::kFloatSums);
      ExpectNear(Multiply(exact, x), Expected(linear, x), 1e-5);
      const PackedMatrix one = PackedMatrix::Pack(linear, 1, &arena);
      EXPECT_EQ(one.input_form().kind, InputKind::kInt8);
      ExpectNear(Multiply(one, x), Expected(linear, x), 3e-2);  // 8-bit input
      const PackedMatrix two = PackedMatrix::Pack(linear, 2, &arena);
      EXPECT_EQ(two.input_form().kind, InputKind::kInt8);
      ExpectNear(Multiply(two, x), Expected(linear, x), 2e-4);  // 16-bit input
    }
  }
}

TEST(PackedMatrixTest, DenseMatricesMultiply) {
  for (const FloatType type : {FloatType::kF16, FloatType::kBF16, FloatType::kF32}) {
    const LogicalLinear linear = RandomLinear(23, 40, 0, type);
    const std::vector<float> x = RandomRows(40);
    Arena arena;
    const PackedMatrix matrix = PackedMatrix::Pack(linear, 1, &arena);
    EXPECT_EQ(matrix.input_form().kind, InputKind::kFloat);
    ExpectNear(Multiply(matrix, x), Expected(linear, x), 1e-5);
  }
}

TEST(PackedMatrixTest, StoredRowsAreTheRowsOfTheShare) {
  // 2500 rows are converted in more than one piece.
  constexpr int32_t kRows = 2500, kColumns = 64;
  LogicalLinear whole = RandomLinear(kRows, kColumns, 0, FloatType::kF16);
  whole.bias.clear();
  std::vector<uint16_t> stored;
  for (const float value : whole.dense) stored.push_back(cpu::FloatToHalf(value));
  const weights::TensorView tensor{.type = weights::TensorType::kF16,
                                   .shape = {kRows, kColumns},
                                   .data = std::as_bytes(std::span(stored))};
  const LogicalLinear share = weights::SliceRows(whole, 400, 2500);
  const std::vector<float> x = RandomRows(kColumns);
  Arena arena;
  const PackedMatrix dense = PackedMatrix::PackStoredRows(tensor, {400, 2500}, false, &arena);
  ExpectNear(Multiply(dense, x), Expected(share, x), 1e-5);
  const PackedMatrix int8 = PackedMatrix::PackStoredRows(tensor, {400, 2500}, true, &arena);
  EXPECT_EQ(int8.input_form().group, 32);
  ExpectNear(Multiply(int8, x), Expected(share, x), 5e-2);
}

}  // namespace
}  // namespace nibble::execution
