// What `nibble bench` runs: every figure that was asked for, and refusals before anything loads.
#include "worker/execution/cpu/bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "base/check.h"
#include "tests/support/test_data.h"

namespace nibble::execution {
namespace {

using ::testing::HasSubstr;

std::unique_ptr<weights::Checkpoint> Open() {
  auto checkpoint =
      weights::Checkpoint::Open(testing::SourceDir() + "/tests/data/model-specs/llama-awq-gemm");
  CHECK(checkpoint.ok());
  return *std::move(checkpoint);
}

TEST(BenchTest, GivesAFigureForEachBatchAndLength) {
  const auto checkpoint = Open();
  std::vector<std::string> told;
  const auto result =
      RunBench(*checkpoint, {.decode_batches = {1, 3},
                             .decode_context = checkpoint->spec().max_context - 10,
                             .decode_tokens = 4,
                             .prefill_lengths = {7, checkpoint->spec().max_context},
                             .runs = 2,
                             .progress = [&](const std::string& what) { told.push_back(what); }});
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->decode.size(), 2u);
  ASSERT_EQ(result->prefill.size(), 2u);
  EXPECT_EQ(result->decode[1].batch, 3);
  EXPECT_EQ(result->prefill[1].length, checkpoint->spec().max_context);
  for (const DecodeFigures& figures : result->decode) EXPECT_GT(figures.tokens_per_second.value, 0);
  for (const PrefillFigures& figures : result->prefill) EXPECT_GT(figures.first_token_ms.value, 0);
  EXPECT_GT(result->memory.weights, 0);
  EXPECT_EQ(told.size(), 5u);
}

TEST(BenchTest, WhatTheContextCannotHoldIsRefusedWithTheLimit) {
  const auto checkpoint = Open();
  const int32_t context = checkpoint->spec().max_context;
  const auto refusal = [&](const BenchOptions& options) {
    const auto result = RunBench(*checkpoint, options);
    EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(result.status().message());
  };
  const std::string limit = "allowed: 1 … " + std::to_string(context);
  EXPECT_THAT(refusal({.decode_context = context + 1}), HasSubstr(limit));
  EXPECT_THAT(refusal({.decode_context = context, .decode_tokens = 4, .prefill_lengths = {8}}),
              HasSubstr("the longest sequence"));
  EXPECT_THAT(refusal({.decode_tokens = 4, .prefill_lengths = {context + 1}}), HasSubstr(limit));
  EXPECT_THAT(refusal({.decode_batches = {0}, .decode_tokens = 4, .prefill_lengths = {8}}),
              HasSubstr("a decode batch is 0"));
}

}  // namespace
}  // namespace nibble::execution
