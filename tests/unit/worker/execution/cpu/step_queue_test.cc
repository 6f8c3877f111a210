#include "worker/execution/cpu/step_queue.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

namespace nibble::execution {
namespace {

step::StepPlan Plan(uint64_t step_id, bool late_masks = false) {
  step::StepPlan plan;
  plan.step_id = step_id;
  plan.sequences.resize(1);
  plan.sequences[0].sample_count = 1;
  if (late_masks) plan.sequences[0].mask = step::MaskSource::kLate;
  return plan;
}

// Runs the next step as a driver would.
void RunOne(StepQueue* queue, const absl::Status& status = absl::OkStatus()) {
  StepQueue::Entry* entry = queue->NextToRun();
  ASSERT_NE(entry, nullptr);
  entry->result.step_id = entry->plan.step_id;
  queue->FinishRun(status);
}

TEST(StepQueueTest, TwoStepsMayBeInFlight) {
  StepQueue queue;
  EXPECT_TRUE(queue.Launch(Plan(1)).ok());
  EXPECT_TRUE(queue.Launch(Plan(2)).ok());
  EXPECT_EQ(queue.Launch(Plan(3)).code(), absl::StatusCode::kFailedPrecondition);
  RunOne(&queue);
  // Run is not waited for.
  EXPECT_EQ(queue.Launch(Plan(3)).code(), absl::StatusCode::kFailedPrecondition);
  step::StepResult result;
  EXPECT_TRUE(queue.Wait(Deadline::max(), &result).ok());
  EXPECT_EQ(result.step_id, 1u);
  EXPECT_TRUE(queue.Launch(Plan(3)).ok());
  RunOne(&queue);
  RunOne(&queue);
  EXPECT_TRUE(queue.Wait(Deadline::max(), &result).ok());
  EXPECT_EQ(result.step_id, 2u);
  EXPECT_TRUE(queue.Wait(Deadline::max(), &result).ok());
  EXPECT_EQ(result.step_id, 3u);
  EXPECT_EQ(queue.Wait(Deadline::max(), &result).code(), absl::StatusCode::kFailedPrecondition);
}

TEST(StepQueueTest, APassedDeadlineLeavesTheStepInFlight) {
  StepQueue queue;
  ASSERT_TRUE(queue.Launch(Plan(1)).ok());
  step::StepResult result;
  EXPECT_EQ(queue.Wait(Deadline(Duration(1)), &result).code(), absl::StatusCode::kDeadlineExceeded);
  RunOne(&queue);
  EXPECT_TRUE(queue.Wait(Deadline(Duration(1)), &result).ok());
}

TEST(StepQueueTest, AFailureStaysAfterTheStepsBeforeIt) {
  StepQueue queue;
  ASSERT_TRUE(queue.Launch(Plan(1)).ok());
  ASSERT_TRUE(queue.Launch(Plan(2)).ok());
  RunOne(&queue);
  RunOne(&queue, absl::AbortedError("lost"));
  EXPECT_EQ(queue.NextToRun(), nullptr);
  step::StepResult result;
  EXPECT_TRUE(queue.Wait(Deadline::max(), &result).ok());
  EXPECT_EQ(queue.Wait(Deadline::max(), &result).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(queue.Wait(Deadline::max(), &result).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(queue.Launch(Plan(3)).code(), absl::StatusCode::kAborted);
}

TEST(StepQueueTest, MasksFindTheirStep) {
  StepQueue queue;
  ASSERT_TRUE(queue.Launch(Plan(1, true)).ok());
  ASSERT_TRUE(queue.Launch(Plan(2, true)).ok());
  step::MaskBatch masks;
  masks.step_id = 2;
  masks.mask_words = {2};
  EXPECT_TRUE(queue.ProvideMasks(masks).ok());
  EXPECT_EQ(queue.ProvideMasks(masks).code(), absl::StatusCode::kFailedPrecondition);
  masks.step_id = 1;
  masks.mask_words = {1};
  EXPECT_TRUE(queue.ProvideMasks(masks).ok());
  for (uint32_t step = 1; step <= 2; ++step) {
    ASSERT_NE(queue.NextToRun(), nullptr);
    const auto found = queue.WaitForMasks();
    ASSERT_TRUE(found.ok());
    EXPECT_EQ((*found)->mask_words[0], step);
    queue.FinishRun(absl::OkStatus());
  }
  masks.step_id = 7;
  EXPECT_EQ(queue.ProvideMasks(masks).code(), absl::StatusCode::kFailedPrecondition);
}

TEST(StepQueueTest, MasksOfAFormerStepAreNotTakenAgain) {
  StepQueue queue;
  step::StepResult result;
  for (uint64_t step = 1; step <= 4; ++step) {
    ASSERT_TRUE(queue.Launch(Plan(step, true)).ok());
    step::MaskBatch masks;
    masks.step_id = step;
    masks.mask_words = {static_cast<uint32_t>(step)};
    std::thread late([&] { EXPECT_TRUE(queue.ProvideMasks(masks).ok()); });
    ASSERT_NE(queue.NextToRun(), nullptr);
    const auto found = queue.WaitForMasks();
    late.join();
    ASSERT_TRUE(found.ok());
    EXPECT_EQ((*found)->mask_words[0], step);
    queue.FinishRun(absl::OkStatus());
    ASSERT_TRUE(queue.Wait(Deadline::max(), &result).ok());
  }
}

TEST(StepQueueTest, StopEndsADriverThatWaits) {
  StepQueue queue;
  std::thread driver([&] { EXPECT_EQ(queue.NextToRun(), nullptr); });
  queue.Stop();
  driver.join();
  StepQueue masked;
  ASSERT_TRUE(masked.Launch(Plan(1, true)).ok());
  ASSERT_NE(masked.NextToRun(), nullptr);
  std::thread sampler(
      [&] { EXPECT_EQ(masked.WaitForMasks().status().code(), absl::StatusCode::kCancelled); });
  masked.Stop();
  sampler.join();
}

}  // namespace
}  // namespace nibble::execution
