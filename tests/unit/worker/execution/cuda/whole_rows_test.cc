#include "worker/execution/cuda/whole_rows.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "kernels/sampling/random.h"
#include "worker/execution/cuda/step_record.h"

namespace nibble::execution {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr step::ExecutorLimits kLimits{
    .vocab_size = 40, .max_context = 64, .max_slots = 4, .max_step_tokens = 16, .kv_blocks = 10};

step::SlotSetup SetupOf(const step::SamplingParams& sampling) {
  step::SlotSetup setup;
  setup.slot = 2;
  setup.seed = 5;
  setup.sampling = sampling;
  setup.history = {7, 8, 9};
  setup.prompt_count = 2;
  return setup;
}

// One sequence on slot 2 with these drafts.
step::StepPlan PlanWith(const std::vector<int32_t>& drafts) {
  step::StepPlan plan;
  plan.token_ids = {5};
  plan.token_ids.insert(plan.token_ids.end(), drafts.begin(), drafts.end());
  plan.sequences.resize(1);
  plan.sequences[0].slot = 2;
  plan.sequences[0].token_count = static_cast<int32_t>(plan.token_ids.size());
  plan.sequences[0].draft_count = static_cast<int32_t>(drafts.size());
  plan.sequences[0].sample_count = plan.sequences[0].draft_count + 1;
  return plan;
}

class WholeRowsTest : public ::testing::Test {
 protected:
  void Open(const step::SlotSetup& setup) { ASSERT_TRUE(rows_.Open(setup).ok()); }
  bool IsPlain(const step::SamplingParams& sampling) {
    Open(SetupOf(sampling));
    return rows_.IsPlain(PlanWith({}).sequences[0], 0);
  }

  WholeRows rows_{kLimits};
};

TEST_F(WholeRowsTest, PlainIsWhatItsBestTokenIsEnoughFor) {
  EXPECT_TRUE(IsPlain({.temperature = 0}));
  EXPECT_TRUE(IsPlain({.temperature = 0.7f}));
  EXPECT_TRUE(IsPlain({.temperature = 0.7f, .top_k = 40}));
  EXPECT_FALSE(IsPlain({.temperature = 0.7f, .top_k = 39}));
  EXPECT_FALSE(IsPlain({.temperature = 0.7f, .top_p = 0.9f}));
  EXPECT_FALSE(IsPlain({.temperature = 0, .presence_penalty = 1}));
  EXPECT_FALSE(IsPlain({.temperature = 0, .logit_bias = {{.token_id = 1, .bias = 2}}}));
  Open(SetupOf({.temperature = 0}));
  step::StepPlan plan = PlanWith({});
  plan.sequences[0].logprobs = 0;
  EXPECT_FALSE(rows_.IsPlain(plan.sequences[0], 0));
  plan = PlanWith({});
  plan.sequences[0].mask = step::MaskSource::kLate;
  EXPECT_FALSE(rows_.IsPlain(plan.sequences[0], 0));
  plan = PlanWith({3});
  EXPECT_FALSE(rows_.IsPlain(plan.sequences[0], 0));
}

TEST_F(WholeRowsTest, RowSaysWhatItsSlotAskedFor) {
  Open(SetupOf({.temperature = 0.5f,
                .top_p = 0.9f,
                .min_p = 0.1f,
                .top_k = 7,
                .repetition_penalty = 2,
                .logit_bias = {{.token_id = 3, .bias = 1}, {.token_id = 40, .bias = 2}}}));
  const WholeRows::Lists& lists = rows_.lists();
  ASSERT_EQ(lists.histories.size(), 1u);
  EXPECT_EQ(lists.histories[0].slot, 2);
  EXPECT_EQ(lists.histories[0].prompt_count, 2);
  EXPECT_THAT(lists.history_tokens, ElementsAre(7, 8, 9));
  rows_.Add(PlanWith({}), PlanWith({}).sequences[0], 6, 1);
  ASSERT_EQ(lists.rows.size(), 1u);
  const cuda::WholeRow& row = lists.rows[0];
  EXPECT_EQ(row.stream, sampling::OutputStream(5, 1));
  EXPECT_EQ(row.inverse_temperature, 2.0);
  EXPECT_EQ(row.row, 6);
  EXPECT_EQ(row.slot, 2);
  EXPECT_EQ(row.top_k, 7);
  EXPECT_EQ(row.penalized, 1);
  EXPECT_EQ(row.feeds, 1);
  EXPECT_EQ(row.bias_count, 1);  // of the two, one is a token
  EXPECT_EQ(lists.biases[0].token_id, 3);
  rows_.Clear();
  EXPECT_EQ(rows_.shape().rows, 0);
  EXPECT_THAT(lists.histories, IsEmpty());
}

TEST_F(WholeRowsTest, StopIdsAreForbiddenUntilMinTokens) {
  step::SlotSetup setup = SetupOf({.temperature = 0});
  setup.stop_ids = {3, 4};
  setup.min_tokens = 2;
  Open(setup);
  const step::StepPlan plan = PlanWith({11, 12});
  EXPECT_FALSE(rows_.IsPlain(PlanWith({}).sequences[0], 1));
  EXPECT_TRUE(rows_.IsPlain(PlanWith({}).sequences[0], 2));
  rows_.Add(plan, plan.sequences[0], 0, 1);
  const WholeRows::Lists& lists = rows_.lists();
  ASSERT_EQ(lists.rows.size(), 3u);
  EXPECT_EQ(lists.rows[0].forbidden_count, 2);
  EXPECT_EQ(lists.rows[1].forbidden_count, 0);
  EXPECT_THAT(lists.ids, ElementsAre(3, 4, 11, 12));
}

TEST_F(WholeRowsTest, DraftsAreOutputOfTheRowsBehindThem) {
  Open(SetupOf({.temperature = 0, .frequency_penalty = 1}));
  const step::StepPlan plan = PlanWith({11, 12});
  rows_.Add(plan, plan.sequences[0], 4, 0);
  const WholeRows::Lists& lists = rows_.lists();
  ASSERT_EQ(lists.rows.size(), 3u);
  for (int32_t i = 0; i < 3; ++i) {
    const cuda::WholeRow& row = lists.rows[static_cast<size_t>(i)];
    EXPECT_EQ(row.row, 4 + i);
    EXPECT_EQ(row.draft_count, i);
    EXPECT_EQ(row.feeds, 0);
  }
  ASSERT_EQ(lists.drafted.size(), 1u);
  EXPECT_EQ(lists.drafted[0].row, 4);
  EXPECT_EQ(lists.drafted[0].draft_count, 2);
  EXPECT_EQ(lists.drafted[0].penalized, 1);
}

TEST_F(WholeRowsTest, MasksAreTakenFromThePlanOrExpected) {
  Open(SetupOf({.temperature = 0}));
  step::StepPlan plan = PlanWith({11});
  plan.mask_words = {1, 2, 77, 3, 4, 77};
  plan.mask_stride = 3;
  plan.sequences[0].mask = step::MaskSource::kHere;
  rows_.Add(plan, plan.sequences[0], 0, 0);
  EXPECT_THAT(rows_.lists().mask_words, ElementsAre(1, 2, 3, 4));
  EXPECT_EQ(rows_.lists().rows[1].mask, cuda::WholeRow::kMaskHere);
  EXPECT_EQ(rows_.lists().rows[1].mask_begin, 2);
  EXPECT_EQ(rows_.late_masks(), 0);
  plan.sequences[0].mask = step::MaskSource::kLate;
  rows_.Add(plan, plan.sequences[0], 2, 0);
  EXPECT_EQ(rows_.late_masks(), 2);
  EXPECT_EQ(rows_.lists().rows[3].mask, cuda::WholeRow::kMaskLate);
  EXPECT_EQ(rows_.lists().rows[3].mask_begin, 2);
}

TEST_F(WholeRowsTest, ListsThatNoStepHasRoomForAreRefused) {
  step::SlotSetup setup = SetupOf({.temperature = 0});
  setup.stop_ids.assign(769, 1);
  EXPECT_TRUE(rows_.Open(setup).ok());
  setup.stop_ids.push_back(1);
  EXPECT_EQ(rows_.Open(setup).code(), absl::StatusCode::kInvalidArgument);
  setup = SetupOf({.presence_penalty = 1});
  setup.history.assign(64, 1);
  for (int32_t i = 0; i < 4; ++i) EXPECT_TRUE(rows_.Open(setup).ok());
  EXPECT_TRUE(rows_.CheckSizes().ok());
  EXPECT_TRUE(rows_.Open(setup).ok());
  EXPECT_EQ(rows_.CheckSizes().code(), absl::StatusCode::kInvalidArgument);
}

TEST(AcceptedTokensTest, TakesDraftsAsFarAsTheyAreRight) {
  StepRecord record;
  record.CopyPlan(PlanWith({11, 12, 13}));
  const auto accepted = [&](std::vector<cuda::SampledToken> tokens) {
    return AcceptedTokens(record, record.sequences[0], tokens);
  };
  EXPECT_EQ(accepted({{11, 0}, {12, 0}, {13, 0}, {14, 0}}), 4);
  EXPECT_EQ(accepted({{11, 0}, {30, 0}, {13, 0}, {14, 0}}), 2);
  EXPECT_EQ(accepted({{30, 0}, {12, 0}, {13, 0}, {14, 0}}), 1);
  EXPECT_EQ(accepted({{11, 0}, {-1, 0}, {13, 0}, {14, 0}}), 0);
  EXPECT_EQ(accepted({{11, 0}, {12, 1}, {13, 0}, {14, 0}}), 0);
}

}  // namespace
}  // namespace nibble::execution
