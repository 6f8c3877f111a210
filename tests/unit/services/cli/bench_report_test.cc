#include "services/cli/bench_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace nibble::cli {
namespace {

using ::testing::HasSubstr;

execution::BenchResult Result() {
  execution::BenchResult result;
  result.isa = "avx2";
  result.ranks = 2;
  result.threads = 1;
  result.runs = 3;
  result.memory = {.weights = 1 << 20, .kv_cache = 1 << 20};
  result.peak_memory_bytes = 1 << 22;
  result.decode.push_back({.batch = 4, .tokens_per_second = {.value = 200, .spread = 5}});
  result.prefill.push_back({.length = 128,
                            .tokens_per_second = {.value = 1000, .spread = 20},
                            .first_token_ms = {.value = 128, .spread = 2}});
  return result;
}

TEST(BenchReport, TableNamesEveryFigure) {
  const std::string table = BenchTable(Result());
  EXPECT_THAT(table, HasSubstr("avx2, 2 ranks of 1 thread, median of 3"));
  EXPECT_THAT(table, HasSubstr("200.0"));
  EXPECT_THAT(table, HasSubstr("20.00"));  // ms a step: 4 sequences at 200 tokens/s
  EXPECT_THAT(table, HasSubstr("1000.0"));
  EXPECT_THAT(table, HasSubstr("process, at its peak"));
}

TEST(BenchReport, RecordsSayUnderWhichConditions) {
  const auto records = BenchRecords(Result());
  ASSERT_EQ(records.size(), 6U);
  EXPECT_EQ(records[0]["metric"], "decode_tokens_per_second");
  EXPECT_EQ(records[0]["value"], 200.0);
  EXPECT_EQ(records[0]["batch"], 4);
  EXPECT_EQ(records[0]["threads"], 1);
  EXPECT_EQ(records[1]["metric"], "prefill_tokens_per_second");
  EXPECT_EQ(records[1]["prompt"], 128);
  EXPECT_EQ(records[3]["metric"], "executor_memory_bytes");
  EXPECT_EQ(records[3]["value"], 2.0 * (1 << 20));
}

}  // namespace
}  // namespace nibble::cli
