#include "worker/weights/logical_linear.h"

#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nibble::weights {
namespace {

using ::testing::HasSubstr;

LogicalLinear Random(int32_t rows, int32_t columns, int32_t group, bool bias = true) {
  std::mt19937 random(static_cast<uint32_t>(rows * 31 + columns + group));
  LogicalLinear linear;
  linear.name = "layer";
  linear.rows = rows;
  linear.columns = columns;
  linear.group_size = group;
  const int32_t count = rows * columns;
  if (group == 0) {
    for (int i = 0; i < count; ++i) linear.dense.push_back(static_cast<float>(random() % 999));
  } else {
    for (int i = 0; i < count; ++i) linear.q.push_back(static_cast<uint8_t>(random() % 16));
    for (int i = 0; i < count / group; ++i) {
      linear.zeros.push_back(static_cast<uint8_t>(random() % 16));
      linear.scales.push_back(static_cast<float>(random() % 999) / 512);
    }
  }
  if (bias) {
    for (int i = 0; i < rows; ++i) linear.bias.push_back(static_cast<float>(i));
  }
  return linear;
}

float At(const LogicalLinear& linear, int32_t row, int32_t column) {
  return Dequantize(linear)[static_cast<size_t>(row) * linear.columns + column];
}

// part holds rows and columns of whole from (row, column) on.
void ExpectPart(const LogicalLinear& whole, const LogicalLinear& part, int32_t row,
                int32_t column) {
  const std::vector<float> all = Dequantize(whole);
  const std::vector<float> some = Dequantize(part);
  ASSERT_EQ(some.size(), static_cast<size_t>(part.rows) * part.columns);
  for (int32_t n = 0; n < part.rows; ++n) {
    for (int32_t k = 0; k < part.columns; ++k) {
      ASSERT_EQ(some[static_cast<size_t>(n) * part.columns + k],
                all[static_cast<size_t>(n + row) * whole.columns + k + column]);
    }
  }
}

TEST(LogicalLinearTest, DequantizeIsTheDefinition) {
  LogicalLinear linear = Random(2, 64, 32);
  linear.q[33] = 3;
  linear.zeros[1] = 10;
  linear.scales[1] = 0.5f;
  EXPECT_EQ(At(linear, 0, 33), -3.5f);
}

TEST(LogicalLinearTest, SlicesOfRowsKeepValuesAndBias) {
  for (const int32_t group : {0, 32, 64}) {
    const LogicalLinear whole = Random(24, 128, group);
    const LogicalLinear part = SliceRows(whole, 8, 19);
    EXPECT_EQ(part.group_size, group);
    EXPECT_EQ(part.bias.size(), 11u);
    EXPECT_EQ(part.bias[0], 8.0f);
    ExpectPart(whole, part, 8, 0);
    EXPECT_EQ(SliceRows(whole, 5, 5).rows, 0);
  }
}

TEST(LogicalLinearTest, SlicesOfColumnsKeepValuesAndTheBiasOnce) {
  struct Case {
    int32_t group, begin, end, expected_group;
  };
  // Cuts on group boundaries keep the group; others get the largest that fits.
  for (const Case& cut : std::vector<Case>{{0, 5, 77, 0},
                                           {128, 0, 128, 128},
                                           {128, 128, 256, 128},
                                           {128, 64, 256, 64},
                                           {128, 96, 256, 32},
                                           {64, 32, 96, 32},
                                           {256, 128, 256, 128},
                                           {256, 0, 256, 256},
                                           {64, 64, 192, 64},
                                           {32, 32, 64, 32}}) {
    const LogicalLinear whole = Random(8, 256, cut.group);
    const auto part = SliceColumns(whole, cut.begin, cut.end);
    ASSERT_TRUE(part.ok()) << part.status();
    EXPECT_EQ(part->group_size, cut.expected_group);
    EXPECT_EQ(part->bias.empty(), cut.begin != 0);
    ExpectPart(whole, *part, 0, cut.begin);
  }
}

TEST(LogicalLinearTest, CutsThatNoGroupFitsAreRefused) {
  const LogicalLinear whole = Random(8, 256, 64);
  const auto part = SliceColumns(whole, 16, 64);
  EXPECT_EQ(part.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(part.status().message()), HasSubstr("layer: columns 16 … 64"));
}

TEST(LogicalLinearTest, RegroupingKeepsEveryValue) {
  const LogicalLinear whole = Random(8, 256, 256);
  for (const int32_t group : {256, 128, 64, 32}) {
    const LogicalLinear again = Regroup(whole, group);
    EXPECT_EQ(again.group_size, group);
    EXPECT_EQ(again.scales.size(), 8u * 256 / group);
    ExpectPart(whole, again, 0, 0);
  }
}

TEST(LogicalLinearTest, ConcatenationStacksRows) {
  const LogicalLinear a = Random(8, 64, 32), b = Random(3, 64, 32, false);
  const auto both = ConcatenateRows({a, b});
  ASSERT_TRUE(both.ok()) << both.status();
  EXPECT_EQ(both->rows, 11);
  ExpectPart(*both, a, 0, 0);
  ExpectPart(*both, b, 8, 0);
  EXPECT_EQ(both->bias[7], 7.0f);
  EXPECT_EQ(both->bias[10], 0.0f);
}

TEST(LogicalLinearTest, ConcatenationWidensDifferingTypesAndRefusesDifferingGroups) {
  LogicalLinear a = Random(8, 64, 32), b = Random(8, 64, 32);
  b.stored_type = FloatType::kBF16;
  EXPECT_EQ(ConcatenateRows({a, b})->stored_type, FloatType::kF32);
  EXPECT_EQ(ConcatenateRows({b, b})->stored_type, FloatType::kBF16);
  EXPECT_FALSE(ConcatenateRows({a, Random(8, 64, 64)}).ok());
  EXPECT_FALSE(ConcatenateRows({a, Random(8, 64, 0)}).ok());
  EXPECT_FALSE(ConcatenateRows({a, Random(8, 128, 32)}).ok());
}

TEST(LogicalLinearTest, PackedGroupsDivideGroupAndCuts) {
  EXPECT_EQ(PackedGroup(128, 0, 256), 128);
  EXPECT_EQ(PackedGroup(576, 0, 576), 64);
  EXPECT_EQ(PackedGroup(96, 0, 96), 32);
  EXPECT_EQ(PackedGroup(128, 64, 192), 64);
  EXPECT_EQ(PackedGroup(64, 80, 160), 0);
}

}  // namespace
}  // namespace nibble::weights
