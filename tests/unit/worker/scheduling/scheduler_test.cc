#include "worker/scheduling/scheduler.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "scheduler_bench.h"

namespace nibble::scheduling {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr int32_t kVocab = 1000;

SchedulerOptions Options() {
  SchedulerOptions options;
  options.limits = {.vocab_size = kVocab,
                    .max_context = 256,
                    .max_slots = 4,
                    .max_step_tokens = 64,
                    .kv_blocks = 32};
  options.prefill_chunk_tokens = 32;
  return options;
}

Deadline At(int seconds) { return Deadline(std::chrono::seconds(seconds)); }

TEST(SchedulerTest, RunsASequenceToItsLength) {
  SchedulerBench bench(Options());
  const SequenceSpec spec = Spec(1, 10, 5);
  bench.scheduler().Add(spec);
  bench.RunToEnd();
  EXPECT_EQ(bench[1].reason, EndReason::kLength);
  EXPECT_EQ(bench[1].tokens, ExpectedTokens(spec, 5, kVocab));
  // Prompt and four outputs: the last one is never fed, nor planned for.
  EXPECT_EQ(bench.executor().tokens_fed(), 14u);
  EXPECT_EQ(bench.executor().rows_sampled(), 5u);
}

TEST(SchedulerTest, PlansTheNextStepBeforeTheResultIsKnown) {
  SchedulerBench bench(Options());
  bench.scheduler().Add(Spec(1, 3, 5));
  ASSERT_TRUE(bench.Launch());
  EXPECT_EQ(bench.planned()->kind, step::kPrefillStep);
  ASSERT_TRUE(bench.Launch());  // nothing has been waited for
  EXPECT_EQ(bench.planned()->kind, step::kDecodeStep);
  ASSERT_THAT(bench.plan().sequences, SizeIs(1));
  EXPECT_TRUE(bench.plan().sequences[0].feed_sampled);
  EXPECT_EQ(bench.plan().sequences[0].first_position, 3);
  EXPECT_THAT(bench.plan().token_ids, ElementsAre(-1));
}

TEST(SchedulerTest, AStopIdIsTheLastTokenAndWhatRanAheadIsDropped) {
  SchedulerBench bench(Options());
  SequenceSpec spec = Spec(1, 3, 50);
  spec.stop_ids = {testing::FakeToken(spec.seed, 4, kVocab)};
  bench.scheduler().Add(spec);
  bench.RunToEnd();
  EXPECT_EQ(bench[1].reason, EndReason::kStop);
  EXPECT_EQ(bench[1].output_count, 5);
  EXPECT_EQ(bench[1].tokens, ExpectedTokens(spec, 5, kVocab));
  EXPECT_EQ(bench.executor().rows_sampled(), 6u);  // one row too many ran, and nobody saw it
}

TEST(SchedulerTest, AStopIdOnTheLastAllowedTokenIsAStop) {
  SchedulerBench bench(Options());
  SequenceSpec spec = Spec(1, 3, 5);
  spec.stop_ids = {testing::FakeToken(spec.seed, 4, kVocab)};
  bench.scheduler().Add(spec);
  bench.RunToEnd();
  EXPECT_EQ(bench[1].reason, EndReason::kStop);
  EXPECT_EQ(bench[1].output_count, 5);
}

TEST(SchedulerTest, NothingStopsBeforeMinTokens) {
  SchedulerBench bench(Options());
  SequenceSpec spec = Spec(1, 3, 20);
  spec.stop_ids = {testing::FakeToken(spec.seed, 2, kVocab),
                   testing::FakeToken(spec.seed, 9, kVocab)};
  spec.min_tokens = 9;
  bench.scheduler().Add(spec);
  bench.RunToEnd();
  EXPECT_EQ(bench[1].reason, EndReason::kStop);
  EXPECT_EQ(bench[1].tokens, ExpectedTokens(spec, 10, kVocab));
}

// An executor does not sample a stop id that early; if it came all the same, nothing would end.
TEST(SchedulerTest, MinTokensHoldsWhateverWasSampled) {
  constexpr int32_t kStopId = 7;
  Scheduler scheduler(Options());
  SequenceSpec spec = Spec(1, 3, 20);
  spec.stop_ids = {kStopId};
  spec.min_tokens = 2;
  scheduler.Add(spec);
  step::StepPlan plan;
  for (const int32_t outputs : {1, 2, 3}) {
    const auto planned = scheduler.Schedule(&plan);
    ASSERT_TRUE(planned.has_value());
    step::StepResult result;
    result.step_id = planned->step_id;
    result.sequences.push_back({.slot = plan.sequences.at(0).slot, .token_count = 1});
    result.tokens.push_back({.token_id = kStopId});
    scheduler.ClearEvents();
    ASSERT_TRUE(scheduler.Commit(result).ok());
    EXPECT_EQ(scheduler.events().back().kind,
              outputs <= spec.min_tokens ? EventKind::kToken : EventKind::kEnded);
  }
}

TEST(SchedulerTest, OutputEndsWithTheContext) {
  SchedulerBench bench(Options());
  bench.scheduler().Add(Spec(1, 250, 100));
  bench.RunToEnd();
  EXPECT_EQ(bench[1].reason, EndReason::kLength);
  EXPECT_EQ(bench[1].output_count, 6);
}

TEST(SchedulerTest, OutputEndsWithThePoolWhereThatIsSmaller) {
  SchedulerOptions options = Options();
  options.limits.kv_blocks = 2;
  EXPECT_EQ(ContextTokens(options.limits), 32);
  SchedulerBench bench(options);
  bench.scheduler().Add(Spec(1, 20, 100));
  bench.RunToEnd();
  EXPECT_EQ(bench[1].reason, EndReason::kLength);
  EXPECT_EQ(bench[1].output_count, 12);
}

TEST(SchedulerTest, PromptsGoInChunksAndOnlyTheLastOneSamples) {
  SchedulerBench bench(Options());
  bench.scheduler().Add(Spec(1, 70, 2));
  std::vector<int32_t> chunks;
  std::vector<int32_t> samples;
  while (bench.Turn()) {
    if (!bench.planned().has_value()) continue;
    chunks.push_back(bench.plan().sequences[0].token_count);
    samples.push_back(bench.plan().sequences[0].sample_count);
  }
  EXPECT_THAT(chunks, ElementsAre(32, 32, 6, 1));
  EXPECT_THAT(samples, ElementsAre(0, 0, 1, 1));
}

TEST(SchedulerTest, PromptsShareOneChunkPerStep) {
  SchedulerBench bench(Options());  // chunks of 32 in steps of 64
  for (uint64_t id = 1; id <= 3; ++id) bench.scheduler().Add(Spec(id, 20, 2));
  ASSERT_TRUE(bench.Launch());
  ASSERT_THAT(bench.plan().sequences, SizeIs(2));
  EXPECT_EQ(bench.plan().sequences[0].token_count, 20);
  EXPECT_EQ(bench.plan().sequences[1].token_count, 12);
  ASSERT_TRUE(bench.Launch());
  EXPECT_EQ(bench.planned()->tokens, 1 + 8 + 20);  // a decode, the rest, the third
}

TEST(SchedulerTest, SlotsAreOpenedWithinTheBytesOfAPlanAndOneAlways) {
  SchedulerOptions options = Options();
  options.setup_bytes_max = 300;
  SchedulerBench bench(options);
  for (uint64_t id = 1; id <= 2; ++id) bench.scheduler().Add(Spec(id, 10, 2));  // 168 bytes each
  SequenceSpec large = Spec(3, 5, 2);
  for (int32_t token = 0; token < 100; ++token) large.stop_ids.push_back(900 + token % 50);
  bench.scheduler().Add(large);
  for (int step = 0; step < 3; ++step) {
    ASSERT_TRUE(bench.Turn());
    EXPECT_THAT(bench.plan().opened, SizeIs(1)) << step;
  }
  bench.RunToEnd();
}

TEST(SchedulerTest, NothingIsAdmittedAboveTheWatermarkButALoneSequence) {
  SchedulerOptions options = Options();
  options.limits.kv_blocks = 10;
  options.kv_watermark = 0.5;
  SchedulerBench bench(options);
  for (uint64_t id = 1; id <= 2; ++id) bench.scheduler().Add(Spec(id, 40, 2));  // 3 blocks each
  bench.scheduler().Add(Spec(3, 120, 2));                                       // 8
  ASSERT_TRUE(bench.Launch());
  EXPECT_EQ(bench.scheduler().running(), 1);
  ASSERT_TRUE(bench.Turn());
  EXPECT_EQ(bench.scheduler().running(), 1);  // six of ten would be used
  bench.RunToEnd();
  EXPECT_EQ(bench[3].output_count, 2);
}

TEST(SchedulerTest, APromptGetsRoomForTheTokenThatFollowsIt) {
  for (const int32_t outputs : {1, 2}) {  // the last output is never fed
    SchedulerBench bench(Options());
    bench.scheduler().Add(Spec(1, step::kBlockTokens, outputs));
    ASSERT_TRUE(bench.Launch());
    EXPECT_EQ(bench.plan().sequences.at(0).block_count, outputs);
    bench.RunToEnd();
  }
}

TEST(SchedulerTest, DecodesGoFirstAndPromptsShareWhatIsLeft) {
  SchedulerOptions options = Options();
  options.limits.max_step_tokens = 20;
  SchedulerBench bench(options);
  bench.scheduler().Add(Spec(1, 4, 50));
  ASSERT_TRUE(bench.Turn());
  ASSERT_TRUE(bench.Turn());
  bench.scheduler().Add(Spec(2, 15, 5));
  bench.scheduler().Add(Spec(3, 40, 5));
  ASSERT_TRUE(bench.Turn());
  EXPECT_EQ(bench.planned()->kind, step::kMixedStep);
  ASSERT_THAT(bench.plan().sequences, SizeIs(3));
  EXPECT_EQ(bench.plan().sequences[0].token_count, 1);
  EXPECT_EQ(bench.plan().sequences[1].token_count, 15);
  EXPECT_EQ(bench.plan().sequences[2].token_count, 4);
  EXPECT_EQ(bench.planned()->tokens, 20);
  bench.RunToEnd();
}

TEST(SchedulerTest, MoreDecodesThanAStepHoldsStillAllEnd) {
  SchedulerOptions options = Options();
  options.limits.max_step_tokens = 3;
  SchedulerBench bench(options);
  for (uint64_t id = 1; id <= 6; ++id) bench.scheduler().Add(Spec(id, 5, 10));
  bench.RunToEnd();
  for (uint64_t id = 1; id <= 6; ++id) EXPECT_EQ(bench[id].output_count, 10) << id;
}

TEST(SchedulerTest, ServesInTheOrderOfArrivalAsSlotsAllow) {
  SchedulerBench bench(Options());
  for (uint64_t id = 1; id <= 6; ++id) bench.scheduler().Add(Spec(id, 2, 10));
  ASSERT_TRUE(bench.Turn());
  for (uint64_t id = 1; id <= 4; ++id) EXPECT_TRUE(bench[id].admitted) << id;
  EXPECT_FALSE(bench[5].admitted);
  bench.scheduler().Cancel(2);
  ASSERT_TRUE(bench.Turn());
  EXPECT_TRUE(bench[5].admitted);  // the slot is closed and opened in one plan
  EXPECT_THAT(bench.plan().closed, SizeIs(1));
  EXPECT_FALSE(bench[6].admitted);
  bench.RunToEnd();
}

TEST(SchedulerTest, ALongPromptAtTheHeadIsNotOvertaken) {
  SchedulerBench bench(Options());
  bench.scheduler().Add(Spec(1, 200, 40));  // 13 blocks of 32; at most 28 may be taken
  ASSERT_TRUE(bench.Turn());
  bench.scheduler().Add(Spec(2, 250, 5));  // 16 more do not fit below the watermark
  bench.scheduler().Add(Spec(3, 2, 5));
  ASSERT_TRUE(bench.Turn());
  EXPECT_FALSE(bench[2].admitted);
  EXPECT_FALSE(bench[3].admitted);
  bench.RunToEnd();
  EXPECT_EQ(bench[2].output_count, 5);
}

TEST(SchedulerTest, ALonePromptMayPassTheWatermark) {
  SchedulerOptions options = Options();
  options.limits.kv_blocks = 4;
  options.kv_watermark = 0.5;
  SchedulerBench bench(options);
  bench.scheduler().Add(Spec(1, 60, 4));
  bench.RunToEnd();
  EXPECT_EQ(bench[1].output_count, 4);
}

TEST(SchedulerTest, OpeningsOfOneStepStayBelowTheirByteLimit) {
  SchedulerOptions options = Options();
  options.setup_bytes_max = 600;
  options.prefill_chunk_tokens = 64;
  SchedulerBench bench(options);
  bench.scheduler().Add(Spec(1, 200, 1));  // larger than the limit, and goes alone
  bench.scheduler().Add(Spec(2, 10, 1));
  bench.scheduler().Add(Spec(3, 10, 1));
  bool together = false;
  while (bench.Turn()) {
    if (bench.planned().has_value() && bench.plan().opened.size() > 1) together = true;
    size_t history = 0;
    for (const auto& setup : bench.plan().opened) history += setup.history.size() * 4;
    EXPECT_TRUE(bench.plan().opened.size() <= 1 || history <= 600);
  }
  EXPECT_TRUE(together);
}

TEST(SchedulerTest, CancelFreesBlocksWithinTwoSteps) {
  SchedulerBench bench(Options());
  bench.scheduler().Add(Spec(1, 40, 50));
  bench.scheduler().Add(Spec(2, 4, 50));
  for (int i = 0; i < 6; ++i) ASSERT_TRUE(bench.Turn());
  bench.scheduler().Cancel(1);
  bench.TakeEvents();
  EXPECT_EQ(bench[1].reason, EndReason::kCancelled);
  EXPECT_GT(bench.scheduler().blocks().quarantined(), 0);  // a step in flight may touch them
  const auto tokens = bench[1].tokens;
  ASSERT_TRUE(bench.Turn());
  ASSERT_TRUE(bench.Turn());
  EXPECT_EQ(bench.scheduler().blocks().quarantined(), 0);
  EXPECT_EQ(bench[1].tokens, tokens);
  bench.scheduler().Cancel(1);
  bench.scheduler().Cancel(77);
  bench.RunToEnd();
  EXPECT_EQ(bench[2].output_count, 50);
}

TEST(SchedulerTest, CancelWorksInEveryState) {
  // Before it is planned, in each chunk, between, decoding, and after its end.
  for (int turns = 0; turns < 12; ++turns) {
    SchedulerBench bench(Options());
    bench.scheduler().Add(Spec(1, 70, 4));
    for (int i = 0; i < turns; ++i) bench.Turn();
    bench.scheduler().Cancel(1);
    bench.TakeEvents();
    EXPECT_TRUE(bench[1].ended) << turns;
    EXPECT_EQ(bench.scheduler().blocks().used(), 0) << turns;
    bench.RunToEnd();
  }
}

TEST(SchedulerTest, DeadlinesEndWhatRunsAndWhatWaits) {
  SchedulerOptions options = Options();
  options.limits.max_slots = 1;
  SchedulerBench bench(options);
  SequenceSpec running = Spec(1, 4, 50);
  running.deadline = At(10);
  running.queue_deadline = At(1);
  SequenceSpec waiting = Spec(2, 4, 50);
  waiting.deadline = At(5);
  SequenceSpec queued = Spec(3, 4, 50);
  queued.queue_deadline = At(7);
  SequenceSpec patient = Spec(4, 4, 3);
  for (const SequenceSpec* spec : {&running, &waiting, &queued, &patient}) {
    bench.scheduler().Add(*spec);
  }
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(bench.Turn());
  bench.scheduler().Expire(At(4));
  bench.TakeEvents();
  EXPECT_FALSE(bench[1].ended);  // its queue deadline ended with its admission
  EXPECT_FALSE(bench[2].ended);
  bench.scheduler().Expire(At(5));
  bench.TakeEvents();
  EXPECT_EQ(bench[2].reason, EndReason::kExpired);
  EXPECT_FALSE(bench[3].ended);
  bench.scheduler().Expire(At(8));
  bench.TakeEvents();
  EXPECT_EQ(bench[3].reason, EndReason::kQueueTimeout);
  bench.scheduler().Expire(At(11));
  bench.TakeEvents();
  EXPECT_EQ(bench[1].reason, EndReason::kExpired);
  bench.RunToEnd();
  EXPECT_EQ(bench[4].output_count, 3);
}

TEST(SchedulerTest, ANonFiniteRowEndsOnlyItsOwnSequence) {
  testing::FakeFaults faults;
  faults.non_finite = [](uint64_t step_id, int32_t slot) { return step_id == 4 && slot == 1; };
  SchedulerBench bench(Options(), faults);
  for (uint64_t id = 1; id <= 3; ++id) bench.scheduler().Add(Spec(id, 4, 10));
  bench.RunToEnd();
  EXPECT_EQ(bench[2].reason, EndReason::kNonFinite);
  EXPECT_EQ(bench[2].output_count, 3);
  for (const uint64_t id : {1, 3}) {
    EXPECT_EQ(bench[id].tokens, ExpectedTokens(Spec(id, 4, 10), 10, kVocab));
  }
}

TEST(SchedulerTest, EndAllEndsEverythingOnce) {
  SchedulerBench bench(Options());
  for (uint64_t id = 1; id <= 9; ++id) bench.scheduler().Add(Spec(id, 20, 10));
  for (int i = 0; i < 3; ++i) bench.Turn();
  bench.scheduler().EndAll(EndReason::kGroupEnded);
  bench.TakeEvents();
  for (uint64_t id = 1; id <= 9; ++id) EXPECT_EQ(bench[id].reason, EndReason::kGroupEnded);
  bench.RunToEnd();
}

TEST(SchedulerTest, RefusesAResultThatIsNoAnswer) {
  const auto commit = [](auto change) {
    Scheduler scheduler(Options());
    scheduler.Add(Spec(1, 4, 10));
    step::StepPlan plan;
    EXPECT_TRUE(scheduler.Schedule(&plan).has_value());
    step::StepResult result;
    result.step_id = plan.step_id;
    result.tokens.push_back({.token_id = 5});
    result.sequences.push_back({.slot = plan.sequences[0].slot, .token_count = 1});
    change(result);
    return scheduler.Commit(result);
  };
  EXPECT_TRUE(commit([](step::StepResult&) {}).ok());
  EXPECT_FALSE(commit([](step::StepResult& r) { r.step_id = 9; }).ok());
  EXPECT_FALSE(commit([](step::StepResult& r) { r.sequences.clear(); }).ok());
  EXPECT_FALSE(commit([](step::StepResult& r) { r.sequences.push_back(r.sequences[0]); }).ok());
  EXPECT_FALSE(commit([](step::StepResult& r) { r.sequences[0].slot = 3; }).ok());
  EXPECT_FALSE(commit([](step::StepResult& r) { r.sequences[0].token_count = 2; }).ok());
  EXPECT_FALSE(commit([](step::StepResult& r) { r.sequences[0].token_begin = 1; }).ok());
  EXPECT_FALSE(commit([](step::StepResult& r) { r.sequences[0].top_count = 1; }).ok());
  EXPECT_FALSE(commit([](step::StepResult& r) { r.tokens[0].token_id = kVocab; }).ok());
  EXPECT_FALSE(commit([](step::StepResult& r) { r.tokens[0].token_id = -1; }).ok());
}

TEST(SchedulerTest, AsksForLogprobsOnlyWhereItSamples) {
  SchedulerBench bench(Options());
  SequenceSpec spec = Spec(1, 40, 2);
  spec.logprobs = 3;
  bench.scheduler().Add(spec);
  ASSERT_TRUE(bench.Turn());
  EXPECT_EQ(bench.plan().sequences[0].logprobs, -1);
  ASSERT_TRUE(bench.Turn());
  EXPECT_EQ(bench.plan().sequences[0].logprobs, 3);
  bench.RunToEnd();
}

}  // namespace
}  // namespace nibble::scheduling
