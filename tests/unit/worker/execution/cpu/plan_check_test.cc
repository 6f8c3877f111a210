#include "worker/execution/cpu/plan_check.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>

namespace nibble::execution {
namespace {

constexpr step::ExecutorLimits kLimits{
    .vocab_size = 100, .max_context = 64, .max_slots = 4, .max_step_tokens = 20, .kv_blocks = 10};

// Slot 2 with 20 prompt tokens in two blocks, its last row sampled.
step::StepPlan GoodPlan() {
  step::StepPlan plan;
  plan.opened.resize(1);
  plan.opened[0].slot = 2;
  plan.opened[0].history.assign(20, 7);
  plan.opened[0].prompt_count = 20;
  plan.token_ids.assign(20, 7);
  plan.block_ids = {9, 3};
  plan.sequences.resize(1);
  plan.sequences[0].slot = 2;
  plan.sequences[0].token_count = 20;
  plan.sequences[0].block_count = 2;
  plan.sequences[0].sample_count = 1;
  return plan;
}

// The step after GoodPlan: the sampled token.
step::StepPlan NextPlan() {
  step::StepPlan plan;
  plan.token_ids = {-1};
  plan.sequences.resize(1);
  plan.sequences[0].slot = 2;
  plan.sequences[0].first_position = 20;
  plan.sequences[0].token_count = 1;
  plan.sequences[0].feed_sampled = true;
  plan.sequences[0].block_table_index = 2;
  plan.sequences[0].sample_count = 1;
  return plan;
}

TEST(PlanCheckTest, GoodPlansPass) {
  PlanChecker checker(kLimits);
  EXPECT_TRUE(checker.Check(GoodPlan()).ok());
  EXPECT_TRUE(checker.Check(NextPlan()).ok());
  step::StepPlan close;
  close.closed = {2};
  EXPECT_TRUE(checker.Check(close).ok());
}

TEST(PlanCheckTest, EveryIndexOutOfRangeIsRefused) {
  using Edit = std::function<void(step::StepPlan&)>;
  const std::vector<std::pair<const char*, Edit>> edits = {
      {"closed", [](auto& p) { p.closed = {4}; }},
      {"closed -1", [](auto& p) { p.closed = {-1}; }},
      {"opened", [](auto& p) { p.opened[0].slot = 4; }},
      {"prompt_count", [](auto& p) { p.opened[0].prompt_count = 21; }},
      {"history", [](auto& p) { p.opened[0].history[3] = 100; }},
      {"sequence slot", [](auto& p) { p.sequences[0].slot = -1; }},
      {"slot not open", [](auto& p) { p.sequences[0].slot = 1; }},
      {"two sequences", [](auto& p) { p.sequences.push_back(p.sequences[0]); }},
      {"token_begin", [](auto& p) { p.sequences[0].token_begin = 1; }},
      {"token_begin -1", [](auto& p) { p.sequences[0].token_begin = -1; }},
      {"token_count 0", [](auto& p) { p.sequences[0].token_count = 0; }},
      {"token_count huge", [](auto& p) { p.sequences[0].token_count = 0x7fffffff; }},
      {"token", [](auto& p) { p.token_ids[19] = 100; }},
      {"token -1", [](auto& p) { p.token_ids[0] = -1; }},
      {"position -1", [](auto& p) { p.sequences[0].first_position = -1; }},
      {"position", [](auto& p) { p.sequences[0].first_position = 45; }},
      {"beyond the blocks", [](auto& p) { p.sequences[0].first_position = 13; }},
      {"block id", [](auto& p) { p.block_ids[1] = 10; }},
      {"block id -1", [](auto& p) { p.block_ids[0] = -1; }},
      {"block_begin", [](auto& p) { p.sequences[0].block_begin = 1; }},
      {"block_count", [](auto& p) { p.sequences[0].block_count = -1; }},
      {"gap in the table", [](auto& p) { p.sequences[0].block_table_index = 1; }},
      {"block copy", [](auto& p) { p.block_copies = {{.from = 0, .to = 10}}; }},
      {"drafts", [](auto& p) { p.sequences[0].draft_count = 20; }},
      {"sample_count", [](auto& p) { p.sequences[0].sample_count = 2; }},
      {"logprobs", [](auto& p) { p.sequences[0].logprobs = 21; }},
      {"feed without a token",
       [](auto& p) {
         p.opened[0].history.clear();
         p.opened[0].prompt_count = 0;
         p.sequences[0].feed_sampled = true;
       }},
      {"mask stride",
       [](auto& p) {
         p.sequences[0].mask = step::MaskSource::kHere;
         p.mask_stride = 3;
         p.mask_words.resize(4);
       }},
      {"mask words",
       [](auto& p) {
         p.sequences[0].mask = step::MaskSource::kHere;
         p.mask_stride = 4;
         p.mask_words.resize(3);
       }},
  };
  for (const auto& [name, edit] : edits) {
    PlanChecker checker(kLimits);
    step::StepPlan plan = GoodPlan();
    edit(plan);
    EXPECT_EQ(checker.Check(plan).code(), absl::StatusCode::kInvalidArgument) << name;
  }
}

TEST(PlanCheckTest, TooManyTokensAreRefused) {
  PlanChecker checker(kLimits);
  step::StepPlan plan = GoodPlan();
  plan.opened.push_back(plan.opened[0]);
  plan.opened[1].slot = 0;
  plan.sequences.push_back(plan.sequences[0]);
  plan.sequences[1].slot = 0;
  EXPECT_EQ(checker.Check(plan).code(), absl::StatusCode::kInvalidArgument);
}

TEST(PlanCheckTest, AClosedSlotForgetsItsBlocks) {
  PlanChecker checker(kLimits);
  ASSERT_TRUE(checker.Check(GoodPlan()).ok());
  step::StepPlan again = GoodPlan();
  again.closed = {2};
  again.sequences[0].block_count = 0;  // the blocks of its former life do not count
  EXPECT_FALSE(checker.Check(again).ok());
}

TEST(PlanCheckTest, CachedBlocksMayStandBeforeTheFirstPosition) {
  PlanChecker checker(kLimits);
  step::StepPlan plan = GoodPlan();
  plan.sequences[0].first_position = 16;
  plan.sequences[0].token_count = 4;
  EXPECT_TRUE(checker.Check(plan).ok());
}

}  // namespace
}  // namespace nibble::execution
