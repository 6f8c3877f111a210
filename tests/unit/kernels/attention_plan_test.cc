#include "kernels/cuda/attention_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

namespace nibble::cuda {
namespace {

// Sequences of one token whose last positions are these.
std::vector<AttentionTile> Tokens(const std::vector<int32_t>& positions) {
  std::vector<AttentionTile> tiles;
  for (const int32_t position : positions) {
    const auto row = static_cast<int32_t>(tiles.size());
    tiles.push_back({.first_row = row, .tokens = 1, .first_position = position, .slot = row});
  }
  return tiles;
}

std::vector<AttentionUnit> Plan(const std::vector<AttentionTile>& tiles,
                                const AttentionPlanShape& shape) {
  std::vector<AttentionUnit> units;
  PlanAttention(tiles, shape, &units);
  return units;
}

TEST(AttentionPlanTest, ShortContextIsNotWorthAMeeting) {
  const auto units = Plan(Tokens({255}), {.kv_heads = 8});
  ASSERT_EQ(units.size(), 1u);
  EXPECT_EQ(units[0].parts, 1);
  EXPECT_EQ(units[0].begin_block, 0);
  EXPECT_EQ(units[0].end_block, 16);
}

TEST(AttentionPlanTest, LongContextIsSharedByAllBlocks) {
  const auto units = Plan(Tokens({8191}), {.kv_heads = 8, .blocks = 132});
  EXPECT_EQ(units.size(), 16u);
  for (const AttentionUnit& unit : units) EXPECT_EQ(unit.end_block - unit.begin_block, 32);
}

TEST(AttentionPlanTest, BatchThatLeavesBlocksIdleIsCutIntoMoreRounds) {
  // 24 sequences of 8 heads on 132 blocks: whole, two rounds of 32 KV blocks.
  const auto units = Plan(Tokens(std::vector<int32_t>(24, 511)), {.kv_heads = 8, .blocks = 132});
  EXPECT_GT(units.size(), 24u);
}

TEST(AttentionPlanTest, WindowHidesWhatLiesBeforeIt) {
  const auto units = Plan(Tokens({1000}), {.kv_heads = 8, .window = 100});
  int32_t begin = 1 << 20;
  for (const AttentionUnit& unit : units) begin = std::min(begin, unit.begin_block);
  EXPECT_EQ(begin, 901 / 16);
}

TEST(AttentionPlanTest, LongUnitsComeFirst) {
  const auto units = Plan(Tokens({20, 4000, 100, 30000}), {.kv_heads = 8});
  for (size_t i = 1; i < units.size(); ++i) {
    EXPECT_GE(units[i - 1].end_block - units[i - 1].begin_block,
              units[i].end_block - units[i].begin_block);
  }
}

// Whatever the step: every tile's KV blocks once and in order, and within what memory there is.
TEST(AttentionPlanTest, PartsOfATileAreItsKvBlocks) {
  std::mt19937 random(3);
  for (int32_t run = 0; run < 300; ++run) {
    const int32_t kv_heads = 1 << random() % 6;
    const int32_t sequences = 1 + static_cast<int32_t>(random() % (run % 2 == 0 ? 8 : 256));
    std::vector<int32_t> positions;
    for (int32_t i = 0; i < sequences; ++i) {
      positions.push_back(static_cast<int32_t>(random() % (1u << random() % 16)));
    }
    const auto tiles = Tokens(positions);
    const auto units = Plan(tiles, {.kv_heads = kv_heads});
    ASSERT_LE(units.size(), tiles.size() + static_cast<size_t>(AttentionUnitsExtra(kv_heads)));
    std::map<int32_t, std::map<int32_t, AttentionUnit>> parts;  // of a row, by part
    std::set<int32_t> places;
    for (const AttentionUnit& unit : units) {
      EXPECT_TRUE(parts[unit.first_row].emplace(unit.part, unit).second);
      if (unit.parts == 1) continue;
      EXPECT_TRUE(places.insert(unit.place + unit.part).second);
      EXPECT_LT(unit.place + unit.part, AttentionPlaces(kv_heads));
    }
    ASSERT_EQ(parts.size(), tiles.size());
    for (const auto& [row, of_row] : parts) {
      int32_t next = 0;
      for (const auto& [part, unit] : of_row) {
        EXPECT_EQ(static_cast<size_t>(unit.parts), of_row.size());
        EXPECT_EQ(unit.begin_block, next);
        EXPECT_GT(unit.end_block, unit.begin_block);
        next = unit.end_block;
      }
      EXPECT_EQ(next, positions[static_cast<size_t>(row)] / 16 + 1);
    }
  }
}

}  // namespace
}  // namespace nibble::cuda
