#include "worker/execution/cuda/host_sampler.h"

#include <gtest/gtest.h>

#include <limits>
#include <thread>
#include <vector>

namespace nibble::execution {
namespace {

constexpr step::ExecutorLimits kLimits{
    .vocab_size = 40, .max_context = 64, .max_slots = 4, .max_step_tokens = 8, .kv_blocks = 10};

// One sequence on slot 1 whose rows' drafts are given.
void MakeStep(StepRecord* record, const std::vector<int32_t>& drafts, step::MaskSource mask) {
  step::StepPlan plan;
  plan.step_id = 9;
  plan.opened.resize(1);
  plan.opened[0].slot = 1;
  plan.opened[0].sampling.temperature = 0;
  plan.token_ids = {5};
  plan.token_ids.insert(plan.token_ids.end(), drafts.begin(), drafts.end());
  plan.sequences.resize(1);
  plan.sequences[0].slot = 1;
  plan.sequences[0].token_count = static_cast<int32_t>(plan.token_ids.size());
  plan.sequences[0].draft_count = static_cast<int32_t>(drafts.size());
  plan.sequences[0].sample_count = plan.sequences[0].draft_count + 1;
  plan.sequences[0].mask = mask;
  record->CopyPlan(plan);
  record->rows.clear();
  for (int32_t draft = 0; draft < plan.sequences[0].sample_count; ++draft) {
    record->rows.push_back(
        {.draft = draft, .output_index = static_cast<uint64_t>(draft), .on_host = true});
  }
}

// Logits whose best token of row i is best[i].
std::vector<float> LogitsWith(const std::vector<int32_t>& best) {
  std::vector<float> logits(best.size() * 40, 0.0f);
  for (size_t i = 0; i < best.size(); ++i) logits[i * 40 + static_cast<size_t>(best[i])] = 4;
  return logits;
}

TEST(HostSamplerTest, TakesDraftsAsFarAsTheyAreRight) {
  HostSampler sampler(kLimits);
  StepRecord record;
  MakeStep(&record, {11, 12, 13}, step::MaskSource::kNone);
  std::vector<float> logits = LogitsWith({11, 30, 13, 14});
  sampler.Begin(&record);
  sampler.Run(&record, 0, 2, logits.data());
  sampler.Run(&record, 2, 4, logits.data() + 2 * 40);
  ASSERT_TRUE(record.status.ok());
  EXPECT_EQ(AcceptedTokens(record, record.sequences[0], record.outcomes), 2);
  EXPECT_EQ(record.outcomes[1].best.token_id, 30);
}

TEST(HostSamplerTest, NonFiniteLogitGivesNoToken) {
  HostSampler sampler(kLimits);
  StepRecord record;
  MakeStep(&record, {}, step::MaskSource::kNone);
  std::vector<float> logits = LogitsWith({11});
  logits[3] = std::numeric_limits<float>::quiet_NaN();
  sampler.Begin(&record);
  sampler.Run(&record, 0, 1, logits.data());
  EXPECT_EQ(AcceptedTokens(record, record.sequences[0], record.outcomes), 0);
}

TEST(HostSamplerTest, WaitsForLateMasks) {
  HostSampler sampler(kLimits);
  StepRecord record;
  MakeStep(&record, {}, step::MaskSource::kLate);
  std::vector<float> logits = LogitsWith({11});
  std::thread stream([&] {
    sampler.Begin(&record);
    sampler.Run(&record, 0, 1, logits.data());
  });
  EXPECT_TRUE(sampler
                  .ProvideMasks(&record, {.step_id = 9,
                                          .mask_words = {1u << 20, 0},  // token 20 alone
                                          .mask_stride = 2})
                  .ok());
  stream.join();
  ASSERT_TRUE(record.status.ok());
  EXPECT_EQ(record.outcomes[0].best.token_id, 20);
  EXPECT_EQ(sampler.ProvideMasks(&record, step::MaskBatch()).code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST(HostSamplerTest, MasksThatAreTooShortFailTheStep) {
  HostSampler sampler(kLimits);
  StepRecord record;
  MakeStep(&record, {}, step::MaskSource::kHere);
  record.mask_words = {1};
  record.mask_stride = 1;
  sampler.Begin(&record);
  EXPECT_EQ(record.status.code(), absl::StatusCode::kInvalidArgument);
}

TEST(HostSamplerTest, StopEndsAWaitForMasks) {
  HostSampler sampler(kLimits);
  StepRecord record;
  MakeStep(&record, {}, step::MaskSource::kLate);
  std::thread stream([&] { sampler.Begin(&record); });
  sampler.Stop();
  stream.join();
  EXPECT_EQ(record.status.code(), absl::StatusCode::kCancelled);
}

}  // namespace
}  // namespace nibble::execution
