#include "worker/weights/shard.h"

#include <algorithm>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nibble::weights {
namespace {

using ::testing::HasSubstr;

model::ModelSpec Spec(int32_t heads, int32_t kv_heads, int32_t ffn = 4096, int32_t vocab = 4001) {
  model::ModelSpec spec;
  spec.head_count = heads;
  spec.kv_head_count = kv_heads;
  spec.head_dim = 64;
  spec.hidden_size = 64 * heads;
  spec.ffn_size = ffn;
  spec.vocab_size = vocab;
  spec.layer_count = 1;
  return spec;
}

// The ranges of the ranks follow each other and fill [0, total).
void ExpectTiling(const std::vector<Range>& ranges, int32_t total, int32_t unit) {
  int32_t position = 0, least = total, most = 0;
  for (const Range& range : ranges) {
    ASSERT_EQ(range.begin, position);
    ASSERT_GT(range.count(), 0);
    position = range.end;
    if (position < total) {
      ASSERT_EQ(position % unit, 0);
    }
    const int32_t units = (range.count() + unit - 1) / unit;
    least = std::min(least, units);
    most = std::max(most, units);
  }
  ASSERT_EQ(position, total);
  ASSERT_LE(most - least, 1);
}

TEST(ShardTest, EveryDegreeTilesTheModel) {
  const std::pair<int32_t, int32_t> shapes[] = {{9, 3}, {32, 8}, {28, 4}, {16, 16},
                                                {8, 1}, {40, 8}, {6, 2}};
  for (const auto& [heads, kv_heads] : shapes) {
    const model::ModelSpec spec = Spec(heads, kv_heads);
    const int32_t queries = heads / kv_heads;
    for (int32_t ranks = 1; ranks <= heads; ++ranks) {
      SCOPED_TRACE(std::to_string(ranks) + " of " + std::to_string(heads));
      const auto shares = ComputeShares(spec, ranks, 64);
      ASSERT_TRUE(shares.ok()) << shares.status();
      ASSERT_EQ(shares->size(), static_cast<size_t>(ranks));
      std::vector<Range> head_ranges, ffn, vocab;
      int32_t least_per_kv = ranks, most_per_kv = 0;
      for (const RankShare& share : *shares) {
        head_ranges.push_back(share.heads);
        ffn.push_back(share.ffn);
        vocab.push_back(share.vocab);
        EXPECT_EQ(share.rank_count, ranks);
        // The KV heads are exactly those of the queries.
        EXPECT_EQ(share.kv_heads.begin, share.heads.begin / queries);
        EXPECT_EQ(share.kv_heads.end, (share.heads.end - 1) / queries + 1);
        if (ranks <= kv_heads) {
          EXPECT_EQ(share.heads.count(), share.kv_heads.count() * queries);
        } else {
          EXPECT_EQ(share.kv_heads.count(), 1);
          const auto sharing =
              static_cast<int32_t>(std::count_if(shares->begin(), shares->end(), [&](auto& other) {
                return other.kv_heads.begin == share.kv_heads.begin;
              }));
          least_per_kv = std::min(least_per_kv, sharing);
          most_per_kv = std::max(most_per_kv, sharing);
        }
      }
      EXPECT_LE(most_per_kv - least_per_kv, 1);
      ExpectTiling(ffn, spec.ffn_size, 64);
      ExpectTiling(vocab, spec.vocab_size, kVocabUnit);
      int32_t position = 0;
      for (const Range& range : head_ranges) {
        EXPECT_EQ(range.begin, position);
        EXPECT_GT(range.count(), 0);
        position = range.end;
      }
      EXPECT_EQ(position, heads);
    }
  }
}

TEST(ShardTest, OddNumbersOfGroupsGiveTheFirstRankMore) {
  const auto shares = ComputeShares(Spec(64, 8, 231 * 128), 2, 128);
  ASSERT_TRUE(shares.ok());
  EXPECT_EQ(shares->at(0).ffn.count(), 116 * 128);
  EXPECT_EQ(shares->at(1).ffn.count(), 115 * 128);
}

TEST(ShardTest, DegreesOutOfRangeNameTheLimit) {
  for (const int32_t ranks : {-1, 0, 10}) {
    const auto shares = ComputeShares(Spec(9, 3), ranks, 64);
    EXPECT_EQ(shares.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(shares.status().message()), HasSubstr("allowed: 1 … 9"));
  }
  const auto shares = ComputeShares(Spec(9, 3, 128), 3, 64);
  EXPECT_THAT(std::string(shares.status().message()), HasSubstr("at most 2"));
  EXPECT_FALSE(ComputeShares(Spec(9, 3, 4096, 30), 3, 64).ok());
}

}  // namespace
}  // namespace nibble::weights
