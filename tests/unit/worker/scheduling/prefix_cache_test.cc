// Prefixes that one sequence leaves and another takes, on the scheduler over the fake executor,
// which checks that a block taken holds the very tokens that it is taken for.
#include <algorithm>
#include <string>

#include "gtest/gtest.h"
#include "scheduler_bench.h"

namespace nibble::scheduling {
namespace {

constexpr int32_t kVocab = 1000;

SchedulerOptions Options(int32_t kv_blocks = 64) {
  SchedulerOptions options;
  options.limits = {.vocab_size = kVocab,
                    .max_context = 512,
                    .max_slots = 4,
                    .max_step_tokens = 128,
                    .kv_blocks = kv_blocks};
  options.prefill_chunk_tokens = 128;
  options.kv_watermark = 1.0;
  return options;
}

SequenceSpec Salted(SequenceSpec spec, std::string salt) {
  spec.prefix_salt = std::move(salt);
  return spec;
}

// Another prompt from position `same` on.
SequenceSpec Branch(SequenceSpec spec, int32_t same) {
  for (size_t i = static_cast<size_t>(same); i < spec.prompt.size(); ++i) spec.prompt[i] += 500;
  return spec;
}

// Runs it alone and says how much of its prompt was cached.
int32_t CachedFor(SchedulerBench* bench, const SequenceSpec& spec) {
  bench->scheduler().Add(spec);
  bench->RunToEnd();
  EXPECT_EQ((*bench)[spec.id].tokens, ExpectedTokens(spec, spec.max_tokens, kVocab));
  return (*bench)[spec.id].cached_tokens;
}

TEST(PrefixCacheTest, WholeBlocksAreTakenAndOneTokenIsLeftToCompute) {
  SchedulerBench bench(Options());
  EXPECT_EQ(CachedFor(&bench, Spec(1, 100, 1)), 0);
  EXPECT_EQ(bench.executor().tokens_fed(), 100u);
  EXPECT_EQ(bench.scheduler().blocks().cached(), 6);
  EXPECT_EQ(CachedFor(&bench, Spec(2, 100, 1)), 96);
  EXPECT_EQ(bench.executor().tokens_fed(), 104u);
  EXPECT_EQ(CachedFor(&bench, Spec(3, 97, 1)), 96);
  EXPECT_EQ(CachedFor(&bench, Spec(4, 96, 1)), 80);
  EXPECT_EQ(CachedFor(&bench, Spec(5, 16, 1)), 0);
  EXPECT_EQ(CachedFor(&bench, Spec(6, 17, 1)), 16);
  EXPECT_EQ(bench[6].queried_tokens, 17);
}

TEST(PrefixCacheTest, OnlyWhatIsTheSameFromTheFirstTokenOnIsTaken) {
  SchedulerBench bench(Options());
  EXPECT_EQ(CachedFor(&bench, Spec(1, 100, 1)), 0);
  EXPECT_EQ(CachedFor(&bench, Branch(Spec(2, 100, 1), 50)), 48);
  EXPECT_EQ(CachedFor(&bench, Branch(Spec(3, 100, 1), 50)), 96);
  SequenceSpec shifted = Spec(4, 100, 1);  // the same blocks but for the first one
  shifted.prompt[3] = 999;
  EXPECT_EQ(CachedFor(&bench, shifted), 0);
}

TEST(PrefixCacheTest, WithAnotherSaltNothingIsTaken) {
  SchedulerBench bench(Options());
  EXPECT_EQ(CachedFor(&bench, Salted(Spec(1, 100, 1), "a")), 0);
  EXPECT_EQ(CachedFor(&bench, Salted(Spec(2, 100, 1), "b")), 0);
  EXPECT_EQ(CachedFor(&bench, Salted(Spec(3, 100, 1), "")), 0);
  EXPECT_EQ(CachedFor(&bench, Salted(Spec(4, 100, 1), "a")), 96);
  EXPECT_EQ(CachedFor(&bench, Salted(Spec(5, 100, 1), "b")), 96);
}

// Two others leave no room for it; what it begins with is cached.
void WaitForRoom(SchedulerBench* bench, int32_t others_outputs) {
  EXPECT_EQ(CachedFor(bench, Spec(1, 100, 1)), 0);
  for (const uint64_t id : {2, 3}) {
    bench->scheduler().Add(Salted(Spec(id, 400, others_outputs), std::to_string(id)));
    while (!(*bench)[id].admitted) ASSERT_TRUE(bench->Turn());
  }
  bench->scheduler().Add(Spec(4, 300, 5));
  ASSERT_TRUE(bench->Turn());
  ASSERT_FALSE((*bench)[4].admitted);
}

TEST(PrefixCacheTest, WhoWaitsForRoomHasItsPrefixLookedForOnce) {
  SchedulerBench bench(Options());
  WaitForRoom(&bench, 50);
  const uint64_t before = bench.scheduler().prefix_lookups();
  constexpr int kTurns = 20;
  for (int i = 0; i < kTurns; ++i) ASSERT_TRUE(bench.Turn());
  ASSERT_FALSE(bench[4].admitted);
  EXPECT_LE(bench.scheduler().prefix_lookups() - before, kTurns + 6);  // and the block behind it
  bench.RunToEnd();
  EXPECT_EQ(bench[4].cached_tokens, 96);
  EXPECT_EQ(bench[4].tokens, ExpectedTokens(Spec(4, 300, 5), 5, kVocab));
}

TEST(PrefixCacheTest, WhoWaitsForRoomTakesNothingThatHasGoneMeanwhile) {
  SchedulerBench bench(Options());
  WaitForRoom(&bench, 90);  // more than there is free: some of what is cached is given away
  bench.RunToEnd();
  EXPECT_GT(bench[4].cached_tokens, 0);
  EXPECT_LT(bench[4].cached_tokens, 96);
  EXPECT_EQ(bench[4].tokens, ExpectedTokens(Spec(4, 300, 5), 5, kVocab));
}

TEST(PrefixCacheTest, WhoWaitsForRoomTakesWhatHasComeMeanwhile) {
  SchedulerBench bench(Options(72));
  EXPECT_EQ(CachedFor(&bench, Spec(1, 100, 1)), 0);
  bench.scheduler().Add(Salted(Spec(2, 480, 20), "a"));
  bench.scheduler().Add(Salted(Spec(3, 300, 90), "b"));
  bench.scheduler().Add(Spec(5, 250, 60));
  bench.scheduler().Add(Spec(4, 300, 5));
  while (!bench[4].admitted) ASSERT_TRUE(bench.Turn());
  EXPECT_EQ(bench[4].cached_tokens, 208);  // as soon as that leaves room
  EXPECT_FALSE(bench[5].ended);
  bench.RunToEnd();
  EXPECT_EQ(bench[4].tokens, ExpectedTokens(Spec(4, 300, 5), 5, kVocab));
}

TEST(PrefixCacheTest, WhoBypassesItTakesNothingAndLeavesNothing) {
  SchedulerBench bench(Options());
  SequenceSpec spec = Spec(1, 100, 1);
  spec.bypass_prefix_cache = true;
  EXPECT_EQ(CachedFor(&bench, spec), 0);
  EXPECT_EQ(bench[1].queried_tokens, 0);
  EXPECT_EQ(bench.scheduler().blocks().cached(), 0);
  EXPECT_EQ(CachedFor(&bench, Spec(2, 100, 1)), 0);
  spec.id = 3;
  EXPECT_EQ(CachedFor(&bench, spec), 0);
}

TEST(PrefixCacheTest, OffIsOff) {
  SchedulerOptions options = Options();
  options.prefix.on = false;
  SchedulerBench bench(options);
  for (uint64_t id = 1; id <= 2; ++id) EXPECT_EQ(CachedFor(&bench, Spec(id, 100, 1)), 0);
  EXPECT_EQ(bench.scheduler().blocks().free(), 64);
}

TEST(PrefixCacheTest, AnAnswerIsAPrefixOfTheNextTurn) {
  SchedulerBench bench(Options());
  const SequenceSpec first = Spec(1, 40, 60);
  EXPECT_EQ(CachedFor(&bench, first), 0);
  SequenceSpec second = Spec(2, 40, 1);
  const std::vector<int32_t> answer = ExpectedTokens(first, 60, kVocab);
  second.prompt.insert(second.prompt.end(), answer.begin(), answer.end());
  second.prompt.resize(120, 7);
  // The last token of the answer was never fed.
  EXPECT_EQ(CachedFor(&bench, second), 96);
}

TEST(PrefixCacheTest, ABlockIsFoundOnlyWhenTheStepThatFilledItHasRetired) {
  SchedulerBench bench(Options());
  bench.scheduler().Add(Spec(1, 100, 20));
  ASSERT_TRUE(bench.Launch());
  bench.scheduler().Add(Spec(2, 100, 1));
  ASSERT_TRUE(bench.Launch());
  ASSERT_TRUE(bench[2].admitted);
  EXPECT_EQ(bench[2].cached_tokens, 0);
  bench.Retire();
  bench.scheduler().Add(Spec(3, 100, 1));
  ASSERT_TRUE(bench.Launch());  // 1 still runs
  EXPECT_EQ(bench[3].cached_tokens, 96);
  bench.Retire();
  bench.RunToEnd();
}

TEST(PrefixCacheTest, APreemptedSequenceFindsItsOwnBlocksAgain) {
  for (const bool bypass : {false, true}) {
    SchedulerBench bench(Options(10));
    for (uint64_t id = 1; id <= 2; ++id) {
      SequenceSpec spec = Branch(Spec(id, 60, 30), 0);
      spec.prompt[0] = static_cast<int32_t>(id);
      spec.bypass_prefix_cache = bypass;
      bench.scheduler().Add(spec);
    }
    bench.RunToEnd();
    EXPECT_EQ(bench[2].preemptions, 1);
    EXPECT_EQ(bench[2].output_count, 30);
    EXPECT_EQ(bench[2].cached_tokens, 0);  // of its first admission
    // Two sequences of 89 positions; the rest was computed twice.
    const uint64_t twice = bench.executor().tokens_fed() - 2 * 89;
    EXPECT_GT(twice, bypass ? 60u : 0u);
    EXPECT_LT(twice, bypass ? 120u : 40u);
  }
}

TEST(PrefixCacheTest, ASequenceThatIsNotFiniteLeavesNothing) {
  for (const uint64_t bad_step : {1, 3}) {
    testing::FakeFaults faults;
    faults.non_finite = [bad_step](uint64_t step_id, int32_t) { return step_id == bad_step; };
    SchedulerOptions options = Options();
    options.prefill_chunk_tokens = bad_step == 1 ? 128 : 48;  // three chunks
    SchedulerBench bench(options, faults);
    bench.scheduler().Add(Spec(1, 100, 10));
    bench.RunToEnd();
    EXPECT_EQ(bench[1].reason, EndReason::kNonFinite);
    EXPECT_EQ(bench.scheduler().blocks().cached(), 0) << bad_step;
    EXPECT_EQ(CachedFor(&bench, Spec(2, 100, 1)), 0);
  }
}

TEST(PrefixCacheTest, WhoGoesOnWithWhatWasWithdrawnNamesItAgain) {
  testing::FakeFaults faults;
  faults.non_finite = [](uint64_t step_id, int32_t slot) { return step_id == 8 && slot == 0; };
  SchedulerBench bench(Options(), faults);
  bench.scheduler().Add(Spec(1, 100, 30));
  for (int turn = 0; turn < 3; ++turn) ASSERT_TRUE(bench.Turn());
  bench.scheduler().Add(Spec(2, 100, 30));
  while (!bench[1].ended) ASSERT_TRUE(bench.Turn());
  EXPECT_EQ(bench[1].reason, EndReason::kNonFinite);
  EXPECT_EQ(bench[2].cached_tokens, 96);
  bench.scheduler().Add(Spec(3, 100, 1));
  ASSERT_TRUE(bench.Turn());
  EXPECT_EQ(bench[3].cached_tokens, 0);
  bench.scheduler().Cancel(3);
  bench.RunToEnd();
  EXPECT_EQ(bench[2].output_count, 30);
  EXPECT_EQ(CachedFor(&bench, Spec(4, 100, 1)), 96);
}

TEST(PrefixCacheTest, WhatEndsForAnotherReasonLeavesWhatIsComputed) {
  SchedulerBench bench(Options());
  bench.scheduler().Add(Spec(1, 100, 50));
  for (int turn = 0; turn < 5; ++turn) ASSERT_TRUE(bench.Turn());
  bench.scheduler().Cancel(1);
  bench.RunToEnd();
  EXPECT_EQ(CachedFor(&bench, Spec(2, 100, 1)), 96);
}

TEST(PrefixCacheTest, CachedBlocksAreGivenAwayLastOfAPrefixFirst) {
  SchedulerBench bench(Options(12));
  EXPECT_EQ(CachedFor(&bench, Spec(1, 100, 1)), 0);
  EXPECT_EQ(bench.scheduler().blocks().cached(), 6);
  // Eight blocks, of which six are free.
  EXPECT_EQ(CachedFor(&bench, Branch(Spec(2, 127, 1), 0)), 0);
  EXPECT_EQ(CachedFor(&bench, Spec(3, 100, 1)), 64);
  EXPECT_EQ(bench[2].preemptions + bench[3].preemptions, 0);
}

TEST(PrefixCacheTest, WhatOthersHoldNeedsNoRoomOfItsOwn) {
  // Of nine blocks the first takes seven. The second, as long, needs one beside those.
  for (const bool same : {true, false}) {
    SchedulerBench bench(Options(9));
    bench.scheduler().Add(Spec(1, 100, 10));
    for (int turn = 0; turn < 2; ++turn) ASSERT_TRUE(bench.Turn());
    bench.scheduler().Add(Branch(Spec(2, 100, 5), same ? 100 : 0));
    ASSERT_TRUE(bench.Turn());
    EXPECT_EQ(bench[2].admitted, same);
    bench.RunToEnd();
    EXPECT_EQ(bench[1].preemptions + bench[2].preemptions, 0);
  }
}

TEST(PrefixCacheTest, AWatermarkCountsASharedBlockOnce) {
  SchedulerOptions options = Options(16);
  options.kv_watermark = 0.5;
  SchedulerBench bench(options);
  bench.scheduler().Add(Spec(1, 100, 10));
  for (int turn = 0; turn < 2; ++turn) ASSERT_TRUE(bench.Turn());
  bench.scheduler().Add(Spec(2, 100, 1));
  bench.scheduler().Add(Branch(Spec(3, 100, 1), 80));
  ASSERT_TRUE(bench.Turn());
  EXPECT_TRUE(bench[2].admitted);
  EXPECT_FALSE(bench[3].admitted);
  bench.RunToEnd();
}

TEST(PrefixCacheTest, AFloodOfOneSaltLeavesOthersTheirs) {
  SchedulerBench bench(Options(32));
  EXPECT_EQ(CachedFor(&bench, Salted(Spec(1, 100, 1), "quiet")), 0);
  for (uint64_t id = 2; id < 40; ++id) {
    SequenceSpec spec = Salted(Spec(id, 100, 1), "flood");
    spec.prompt[0] = static_cast<int32_t>(id + 50);
    EXPECT_EQ(CachedFor(&bench, spec), 0);
    EXPECT_LE(bench.scheduler().blocks().cached(), 16 + 6);
  }
  EXPECT_EQ(CachedFor(&bench, Salted(Spec(40, 100, 1), "quiet")), 96);
}

TEST(PrefixCacheTest, ASaltAloneMayKeepEverything) {
  SchedulerBench bench(Options(32));
  for (uint64_t id = 1; id < 20; ++id) {
    SequenceSpec spec = Spec(id, 100, 1);
    spec.prompt[0] = static_cast<int32_t>(id + 50);
    EXPECT_EQ(CachedFor(&bench, spec), 0);
  }
  EXPECT_GE(bench.scheduler().blocks().cached(), 30);
}

// Two that compute the same at once keep their own blocks; only one of each is found later. When
// the one whose blocks have the names goes, the other's take over.
TEST(PrefixCacheTest, TwinsDoNotNeedEachOther) {
  SchedulerBench bench(Options(24));
  bench.scheduler().Add(Spec(1, 100, 20));
  bench.scheduler().Add(Spec(2, 100, 200));
  for (int turn = 0; turn < 40; ++turn) ASSERT_TRUE(bench.Turn());
  ASSERT_TRUE(bench[1].ended);
  bench.scheduler().Add(Branch(Spec(3, 160, 1), 0));  // takes what the first left
  bench.RunToEnd();
  EXPECT_EQ(bench[2].tokens, ExpectedTokens(Spec(2, 100, 200), 200, kVocab));
  EXPECT_EQ(CachedFor(&bench, Spec(4, 100, 1)), 96);
}

}  // namespace
}  // namespace nibble::scheduling
