#include "kernels/cuda/attention_plan.h"

#include <algorithm>
#include <tuple>

#include "kernels/cuda/attention_layout.h"
#include "kernels/cuda/ceil_divide.h"

namespace nibble::cuda {
namespace {

// In nanoseconds, measured with heads of 128: what a unit costs beside its KV blocks, what it costs
// that parts meet in memory, and what a KV block costs behind the first ones, which are brought
// while the kernel before still works: where one multiprocessor reads, and for each that reads.
constexpr double kUnitTime = 600;
constexpr double kMeetingTime = 1100;
constexpr int32_t kBlocksAhead = 8;
constexpr double kLoneBlockTime = 115;
constexpr double kSharedBlockTime = 1.76;
constexpr int32_t kBlocksTogether = 2 * kAttentionBlocks;

struct Range {
  int32_t begin, end;  // KV blocks
};

Range Blocks(const AttentionTile& tile, int32_t window) {
  const int32_t first = window > 0 ? std::max(0, tile.first_position - window + 1) : 0;
  return {first / kKvBlockTokens,
          (tile.first_position + std::max(tile.tokens, 1) - 1) / kKvBlockTokens + 1};
}

// How long the longest of the blocks works if no unit has more than `longest` KV blocks; or -1 if
// that makes too many units.
double Cost(std::span<const AttentionTile> tiles, const AttentionPlanShape& shape,
            int32_t longest) {
  int32_t units = 0, whole = 0;
  bool split = false;
  for (const AttentionTile& tile : tiles) {
    const Range range = Blocks(tile, shape.window);
    const int32_t count = range.end - range.begin;
    units += CeilDivide(count, longest);
    whole += count;
    split = split || count > longest;
  }
  if (units > static_cast<int32_t>(tiles.size()) + AttentionUnitsExtra(shape.kv_heads)) return -1;
  const int32_t items = units * shape.kv_heads;
  const double block = std::max(kLoneBlockTime, kSharedBlockTime * std::min(items, shape.blocks));
  const int32_t rounds = CeilDivide(items, shape.blocks);
  const int32_t brought = rounds == 1 ? std::max(0, longest - kBlocksAhead) : longest;
  const double unit = kUnitTime + brought * block;
  const double in_turn = rounds * unit;
  const double balanced =
      (whole * block + units * kUnitTime) * shape.kv_heads / shape.blocks + unit;
  return std::min(in_turn, balanced) + (split ? kMeetingTime : 0);
}

int32_t LongestUnit(std::span<const AttentionTile> tiles, const AttentionPlanShape& shape) {
  int32_t most = 1;
  for (const AttentionTile& tile : tiles) {
    const Range range = Blocks(tile, shape.window);
    most = std::max(most, range.end - range.begin);
  }
  const int32_t tries = std::max(4, 256 / static_cast<int32_t>(tiles.size() + 1));
  int32_t best = most;
  double least = -1;
  for (int32_t parts = 1, last = 0; parts <= std::min(most, tries); ++parts) {
    const int32_t longest = CeilDivide(most, parts);
    if (longest == last) continue;
    last = longest;
    const double cost = Cost(tiles, shape, longest);
    if (cost < 0) break;
    if (least < 0 || cost < least) {
      least = cost;
      best = longest;
    }
  }
  return best;
}

}  // namespace

int32_t AttentionUnitsExtra(int32_t kv_heads) {
  return std::min(kAttentionUnitsExtraMax, CeilDivide(kBlocksTogether, kv_heads));
}

int32_t AttentionPlaces(int32_t kv_heads) { return 2 * AttentionUnitsExtra(kv_heads); }

void PlanAttention(std::span<const AttentionTile> tiles, const AttentionPlanShape& shape,
                   std::vector<AttentionUnit>* units) {
  units->clear();
  if (tiles.empty()) return;
  const int32_t longest = LongestUnit(tiles, shape);
  int32_t place = 0;
  for (const AttentionTile& tile : tiles) {
    const Range range = Blocks(tile, shape.window);
    const int32_t count = range.end - range.begin;
    const int32_t share = CeilDivide(count, CeilDivide(count, longest));
    const int32_t parts = CeilDivide(count, share);
    for (int32_t part = 0; part < parts; ++part) {
      const int32_t begin = range.begin + part * share;
      units->push_back({.first_row = tile.first_row,
                        .first_position = tile.first_position,
                        .slot = tile.slot,
                        .tokens = static_cast<int16_t>(tile.tokens),
                        .parts = static_cast<int16_t>(parts),
                        .begin_block = begin,
                        .end_block = std::min(range.end, begin + share),
                        .place = parts > 1 ? place : 0,
                        .part = part});
    }
    if (parts > 1) place += parts;
  }
  std::sort(units->begin(), units->end(), [](const AttentionUnit& a, const AttentionUnit& b) {
    return std::tuple(b.end_block - b.begin_block, a.first_row, a.part) <
           std::tuple(a.end_block - a.begin_block, b.first_row, b.part);
  });
}

}  // namespace nibble::cuda
