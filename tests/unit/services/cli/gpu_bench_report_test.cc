#include "services/cli/gpu_bench_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "services/cli/fusion_table.h"

namespace nibble::cli {
namespace {

using ::testing::HasSubstr;

execution::GpuBenchResult Result() {
  execution::GpuBenchResult result;
  result.gpu.name = "a GPU";
  result.ranks = 1;
  result.runs = 3;
  result.slots = 1;
  result.positions = 64;
  result.max_step_tokens = 32;
  result.memory = {.weights = 4'000'000'000, .kv_cache = 500'000'000};
  result.decode.push_back(
      {.batch = 1, .depth = 32, .tokens_per_second = {.value = 800, .spread = 8}});
  result.prefill.push_back({.length = 32, .tokens_per_second = {.value = 9000, .spread = 90}});
  result.read_bandwidth = 4e12;
  result.operations.push_back({.batch = 1,
                               .prompt = 32,
                               .operations = {{.name = "qkv",
                                               .calls = 32,
                                               .microseconds = 320,
                                               .bytes = 640'000'000,
                                               .flops = 1'600'000'000}}});
  return result;
}

TEST(GpuBenchReport, OperationsAreSetAgainstTheReadBandwidth) {
  const std::string table = GpuBenchTable(Result());
  EXPECT_THAT(table, HasSubstr("a decode step of 1 at depth 32"));
  EXPECT_THAT(table, HasSubstr("10.00"));  // us each
  EXPECT_THAT(table, HasSubstr("640.0"));
  EXPECT_THAT(table, HasSubstr("50.0 %"));  // 2 of 4 TB/s
  EXPECT_THAT(table, HasSubstr("without graphs and overlap"));
}

TEST(GpuBenchReport, RecordsNameOwnersAndOperations) {
  auto records = nlohmann::ordered_json::array();
  AddGpuBenchRecords(Result(), &records);
  int owners = 0, operations = 0;
  for (const auto& record : records) {
    for (const char* field : {"metric", "value", "tp", "batch", "prompt", "depth", "fusion",
                              "activations", "kv_bits", "runs", "spread"}) {
      EXPECT_TRUE(record.contains(field)) << field;
    }
    if (record["metric"] == "device_bytes") {
      ++owners;
      EXPECT_EQ(record["depth"], 64);
      if (record["owner"] == "all") {
        EXPECT_EQ(record["value"], 4.5e9);
      }
    }
    if (record["metric"] == "operation_us") {
      ++operations;
      EXPECT_EQ(record["operation"], "qkv");
      EXPECT_EQ(record["calls"], 32);
      EXPECT_EQ(record["bytes"], 640'000'000);
    }
  }
  EXPECT_EQ(owners, 6);
  EXPECT_EQ(operations, 1);
  EXPECT_EQ(records[0]["metric"], "decode_tokens_per_s");
  EXPECT_EQ(records[0]["spread"], 0.01);
}

TEST(GpuBenchReport, OneRanksShareIsNoFigureOfSeveralGpus) {
  execution::GpuBenchResult result = Result();
  result.ranks = 4;
  result.one_rank = true;
  EXPECT_THAT(GpuBenchTable(result), HasSubstr("one rank's share of 4 on one a GPU"));
  EXPECT_THAT(GpuBenchTable(result), HasSubstr("NOT a figure of several GPUs"));
  auto records = nlohmann::ordered_json::array();
  AddGpuBenchRecords(result, &records);
  for (const auto& record : records) {
    EXPECT_EQ(std::string(record["metric"]).rfind("one_rank_", 0), 0u) << record["metric"];
  }
  EXPECT_EQ(GpuBenchHeader(result, "m", "c", {})["gpus"], 1);
}

TEST(FusionTable, LinesStandBesideThePublishedOnesOfTheirMode) {
  std::vector<execution::GpuBenchResult> lines = {Result(), Result()};
  lines[1].fusion = false;
  lines[1].decode[0].tokens_per_second.value = 384.537;
  const std::string table = FusionTable(lines);
  EXPECT_THAT(table, HasSubstr("fusion on, length"));
  EXPECT_THAT(table, HasSubstr("80.3"));
  EXPECT_THAT(table, HasSubstr("4.50"));
  EXPECT_THAT(table, HasSubstr("fusion off, length"));
  EXPECT_THAT(table, HasSubstr("38.5"));
  EXPECT_THAT(table, HasSubstr("10.0"));  // times
}

TEST(FusionTable, ALineHasRoomForItselfAlone) {
  const execution::GpuBenchOptions options{.max_step_tokens = 512, .timed_batches = {1}};
  const execution::GpuBenchOptions line = FusionTableOptions(128, false, options);
  EXPECT_FALSE(line.fusion);
  EXPECT_EQ(line.max_step_tokens, 128);
  EXPECT_EQ(line.decode_tokens, 127);
  EXPECT_EQ(line.decode_depths, std::vector<int32_t>{128});
  EXPECT_TRUE(line.timed_batches.empty());
  EXPECT_EQ(FusionTableOptions(2048, true, options).max_step_tokens, 512);
}

}  // namespace
}  // namespace nibble::cli
