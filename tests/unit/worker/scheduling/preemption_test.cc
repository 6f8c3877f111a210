// What happens when the blocks run out.
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "scheduler_bench.h"
#include "worker/scheduling/scheduler.h"

namespace nibble::scheduling {
namespace {

constexpr int32_t kVocab = 1000;

SchedulerOptions Options(int32_t kv_blocks) {
  SchedulerOptions options;
  options.limits = {.vocab_size = kVocab,
                    .max_context = 1024,
                    .max_slots = 8,
                    .max_step_tokens = 64,
                    .kv_blocks = kv_blocks};
  options.prefill_chunk_tokens = 64;
  options.kv_watermark = 1.0;
  return options;
}

TEST(PreemptionTest, PreemptsTheYoungestAndRecomputesIt) {
  SchedulerBench bench(Options(4));
  for (uint64_t id = 1; id <= 2; ++id) bench.scheduler().Add(Spec(id, 20, 30));
  bench.RunToEnd();
  EXPECT_EQ(bench[1].preemptions, 0);
  EXPECT_GE(bench[2].preemptions, 1);
  for (uint64_t id = 1; id <= 2; ++id) {
    EXPECT_EQ(bench[id].tokens, ExpectedTokens(Spec(id, 20, 30), 30, kVocab)) << id;
  }
  EXPECT_GT(bench.scheduler().tokens_given_up(), 0u);
}

TEST(PreemptionTest, WaitsInsteadWhenBlocksAreOnTheirWay) {
  // Three sequences fill the pool. The third is cancelled just as the first needs a block.
  SchedulerBench bench(Options(6));
  bench.scheduler().Add(Spec(1, 31, 20));
  bench.scheduler().Add(Spec(2, 20, 8));
  bench.scheduler().Add(Spec(3, 20, 8));
  ASSERT_TRUE(bench.Turn());
  ASSERT_TRUE(bench.Turn());
  ASSERT_EQ(bench.scheduler().blocks().free(), 0);
  bench.scheduler().Cancel(3);
  bench.RunToEnd();
  EXPECT_EQ(bench[1].preemptions + bench[2].preemptions, 0);
  EXPECT_EQ(bench[1].output_count, 20);
}

TEST(PreemptionTest, WhatWasInFlightAtAPreemptionStillCounts) {
  SchedulerBench bench(Options(4));
  bench.scheduler().Add(Spec(1, 20, 30));
  bench.scheduler().Add(Spec(2, 20, 30));
  size_t seen = 0;
  while (bench.Turn() && bench[2].preemptions == 0) seen = bench[2].tokens.size();
  // The step in flight sampled one more token for it; it arrives and is not computed twice.
  bench.Turn();
  EXPECT_GE(bench[2].tokens.size(), seen);
  bench.RunToEnd();
  EXPECT_EQ(bench[2].output_count, 30);
}

TEST(PreemptionTest, APreemptedSequenceCanEndWhileItWaits) {
  // Its stop id is what the step in flight at the preemption samples.
  int32_t outputs_at_preemption = 0;
  for (const bool with_stop : {false, true}) {
    SchedulerBench bench(Options(4));
    SequenceSpec second = Spec(2, 20, 30);
    second.seed = 2001;  // none of its first twenty tokens repeats
    if (with_stop) {
      second.stop_ids = {testing::FakeToken(second.seed, outputs_at_preemption, kVocab)};
    }
    bench.scheduler().Add(Spec(1, 20, 30));
    bench.scheduler().Add(second);
    while (bench[2].preemptions == 0 && bench.Launch()) {
      if (bench[2].preemptions == 0 && bench.scheduler().in_flight() == 2) bench.Retire();
    }
    outputs_at_preemption = static_cast<int32_t>(bench[2].tokens.size());
    ASSERT_EQ(bench[2].preemptions, 1);
    ASSERT_FALSE(bench[2].ended);
    bench.RunToEnd();
    EXPECT_EQ(bench[2].reason, with_stop ? EndReason::kStop : EndReason::kLength);
    if (with_stop) {
      EXPECT_EQ(bench[2].output_count, outputs_at_preemption + 1);
      EXPECT_EQ(bench[2].preemptions, 1);
    }
  }
}

TEST(PreemptionTest, CancelAndDeadlineReachAPreemptedSequence) {
  for (const bool expire : {false, true}) {
    SchedulerBench bench(Options(4));
    SequenceSpec second = Spec(2, 20, 30);
    second.deadline = Deadline(std::chrono::seconds(9));
    second.queue_deadline = Deadline(std::chrono::seconds(1));
    bench.scheduler().Add(Spec(1, 20, 30));
    bench.scheduler().Add(second);
    while (bench[2].preemptions == 0 && bench.Turn()) {
    }
    bench.scheduler().Expire(Deadline(std::chrono::seconds(2)));
    bench.TakeEvents();
    EXPECT_FALSE(bench[2].ended);  // waiting again is not waiting for admission
    if (expire) {
      bench.scheduler().Expire(Deadline(std::chrono::seconds(9)));
    } else {
      bench.scheduler().Cancel(2);
    }
    bench.TakeEvents();
    EXPECT_EQ(bench[2].reason, expire ? EndReason::kExpired : EndReason::kCancelled);
    bench.RunToEnd();
    EXPECT_EQ(bench[1].output_count, 30);
  }
}

TEST(PreemptionTest, NobodyIsPreemptedMoreOftenThanTheLimit) {
  for (const int32_t limit : {0, 1, 2, 4}) {
    SchedulerOptions options = Options(8);
    options.preemptions_max = limit;
    SchedulerBench bench(options);
    for (uint64_t id = 1; id <= 12; ++id) bench.scheduler().Add(Spec(id, 5, 100));
    bench.RunToEnd();
    int32_t most = 0;
    for (uint64_t id = 1; id <= 12; ++id) {
      EXPECT_EQ(bench[id].output_count, 100) << id;
      most = std::max(most, bench[id].preemptions);
    }
    EXPECT_LE(most, limit);
    EXPECT_TRUE(limit != 1 || most == 1);  // the limit was reached, so it was tried
  }
}

TEST(PreemptionTest, TheLargestRequestThatFitsEndsInTheSmallestPool) {
  SchedulerBench bench(Options(4));
  bench.scheduler().Add(Spec(1, 1, 63));
  bench.scheduler().Add(Spec(2, 62, 2));
  bench.scheduler().Add(Spec(3, 63, 50));
  bench.RunToEnd();
  EXPECT_EQ(bench[1].output_count, 63);
  EXPECT_EQ(bench[2].output_count, 2);
  EXPECT_EQ(bench[3].output_count, 1);
}

}  // namespace
}  // namespace nibble::scheduling
