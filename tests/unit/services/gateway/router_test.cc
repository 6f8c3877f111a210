#include "services/gateway/router.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "base/clock.h"
#include "services/gateway/retry_budget.h"

namespace nibble::gateway {
namespace {

using Outcome = Resolution::Outcome;

class RouterTest : public ::testing::Test {
 protected:
  static std::shared_ptr<const ServedModel> Model(const std::string& name,
                                                  const std::string& hash = "h",
                                                  uint32_t max_sequences = 8) {
    auto model = std::make_shared<ServedModel>();
    model->info.set_model(name);
    model->info.set_model_hash(hash);
    model->info.set_tokenizer_hash(hash);
    model->info.set_max_sequences(max_sequences);
    return model;
  }
  static worker::v1::Load Load(uint32_t running, uint32_t waiting = 0) {
    worker::v1::Load load;
    load.set_ready(true);
    load.set_running(running);
    load.set_waiting(waiting);
    return load;
  }
  void BringUp(size_t group, std::shared_ptr<const ServedModel> model, uint32_t running = 0) {
    ASSERT_TRUE(router_.Connected(group, std::move(model)).ok());
    router_.Beat(group, Load(running));
    router_.Beat(group, Load(running));
  }
  bool Ready(size_t group) { return router_.Snapshot()[group].ready; }

  ManualClock clock_;
  Router router_{{"a:1", "b:1", "c:1"}, {}, &clock_};
};

TEST_F(RouterTest, TwoGoodBeatsEnterAndOneBadLeaves) {
  ASSERT_TRUE(router_.Connected(0, Model("m")).ok());
  EXPECT_FALSE(Ready(0));
  router_.Beat(0, Load(0));
  EXPECT_FALSE(Ready(0));
  router_.Beat(0, Load(0));
  EXPECT_TRUE(Ready(0));
  worker::v1::Load draining = Load(0);
  draining.set_draining(true);
  router_.Beat(0, draining);
  EXPECT_FALSE(Ready(0));
  router_.Beat(0, Load(0));
  EXPECT_FALSE(Ready(0));
  router_.Beat(0, Load(0));
  EXPECT_TRUE(Ready(0));
}

TEST_F(RouterTest, WithoutABeatForThreeSecondsIsNotReady) {
  BringUp(0, Model("m"));
  clock_.Advance(std::chrono::seconds(3));
  EXPECT_TRUE(Ready(0));
  clock_.Advance(std::chrono::milliseconds(1));
  EXPECT_FALSE(Ready(0));
  EXPECT_FALSE(router_.AnyReady());
  EXPECT_EQ(router_.Pick(*Model("m"), 1, std::nullopt), std::nullopt);
  router_.Beat(0, Load(0));
  EXPECT_TRUE(Ready(0));
}

TEST_F(RouterTest, LostGroupIsNotReadyAtOnce) {
  BringUp(0, Model("m"));
  router_.Lost(0);
  EXPECT_FALSE(Ready(0));
  router_.Beat(0, Load(0));  // of a stream that is being torn down
  EXPECT_FALSE(Ready(0));
}

TEST_F(RouterTest, AGroupThatLeavesGetsNothingUntilItsBeatsSayOtherwise) {
  BringUp(0, Model("m"));
  router_.Leaving(0);
  EXPECT_FALSE(Ready(0));
  router_.Beat(0, Load(0));  // of before its drain
  EXPECT_FALSE(Ready(0));
  router_.Beat(0, Load(0));
  EXPECT_TRUE(Ready(0));
}

TEST_F(RouterTest, PicksTheLeastLoadedAndCountsWhatItSent) {
  BringUp(0, Model("m"), 2);
  BringUp(1, Model("m"), 1);
  EXPECT_EQ(router_.Pick(*Model("m"), 1, std::nullopt), 1U);  // 1 against 2
  EXPECT_EQ(router_.Pick(*Model("m"), 2, std::nullopt), 0U);  // 2 each, none of ours at 0
  EXPECT_EQ(router_.Pick(*Model("m"), 1, std::nullopt), 1U);  // 2 against 4
  EXPECT_EQ(router_.Snapshot()[0].in_flight, 2U);
  EXPECT_EQ(router_.Snapshot()[1].in_flight, 2U);
  router_.Release(1, 2);
  EXPECT_EQ(router_.Snapshot()[1].in_flight, 0U);
}

TEST_F(RouterTest, FullIsWhatWeSentAndTheGroupHasTold) {
  const auto model = [] {
    auto made = std::make_shared<ServedModel>(*Model("m", "h", 2));
    made->info.set_queue_size(1);
    return made;
  };
  EXPECT_EQ(router_.Full(*model()), std::nullopt);  // no group at all is another error
  BringUp(0, model());
  EXPECT_EQ(router_.Full(*model()), std::nullopt);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(router_.Full(*model()), std::nullopt) << i;
    EXPECT_EQ(router_.Pick(*model(), 1, std::nullopt), 0U);
  }
  EXPECT_EQ(router_.Full(*model()), 3);
  router_.Beat(0, Load(2, 1));
  EXPECT_EQ(router_.Full(*model()), 3);
  // One of them is back before the next beat tells of it.
  router_.Release(0, 1);
  EXPECT_EQ(router_.Full(*model()), std::nullopt);
  EXPECT_EQ(router_.Pick(*model(), 1, std::nullopt), 0U);
  EXPECT_EQ(router_.Full(*model()), 3);
  // Slow readers keep what their group is done with.
  router_.Beat(0, Load(0));
  EXPECT_EQ(router_.Full(*model()), std::nullopt);
  // Another group has room, then it has none, then it is gone.
  router_.Beat(0, Load(2, 1));
  BringUp(1, model());
  EXPECT_EQ(router_.Full(*model()), std::nullopt);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(router_.Pick(*model(), 1, std::nullopt), 1U);
  EXPECT_EQ(router_.Full(*model()), 6);
  router_.Lost(1);
  EXPECT_EQ(router_.Full(*model()), 3);
  EXPECT_EQ(router_.Full(*Model("other")), std::nullopt);
}

TEST_F(RouterTest, AGroupThatDoesNotSayHowLongItsQueueIsIsNeverFull) {
  BringUp(0, Model("m", "h", 1), 1);
  EXPECT_EQ(router_.Pick(*Model("m"), 1, std::nullopt), 0U);
  EXPECT_EQ(router_.Full(*Model("m")), std::nullopt);
}

// A beat that the leader sent before our requests reached it says nothing of them.
TEST_F(RouterTest, WhatIsInFlightCountsThroughABeatThatMissedIt) {
  BringUp(0, Model("m"));
  BringUp(1, Model("m"), 2);
  EXPECT_EQ(router_.Pick(*Model("m"), 3, std::nullopt), 0U);
  router_.Beat(0, Load(0));
  EXPECT_EQ(router_.Pick(*Model("m"), 1, std::nullopt), 1U);  // 3 against 2
  router_.Release(0, 3);
  EXPECT_EQ(router_.Pick(*Model("m"), 1, std::nullopt), 0U);
}

TEST_F(RouterTest, LoadIsPerPlace) {
  BringUp(0, Model("m", "h", 4), 2);   // half full
  BringUp(1, Model("m", "h", 64), 8);  // an eighth
  EXPECT_EQ(router_.Pick(*Model("m"), 1, std::nullopt), 1U);
}

TEST_F(RouterTest, NeverPicksTheExcludedOrAnotherModel) {
  BringUp(0, Model("m"));
  BringUp(1, Model("other"));
  EXPECT_EQ(router_.Pick(*Model("m"), 1, 0U), std::nullopt);
  EXPECT_EQ(router_.Pick(*Model("m", "newer files"), 1, std::nullopt), std::nullopt);
}

TEST_F(RouterTest, RefusesAGroupWhoseHashesDiffer) {
  BringUp(0, Model("m", "one"));
  const absl::Status status = router_.Connected(1, Model("m", "two"));
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  router_.Lost(0);
  EXPECT_TRUE(router_.Connected(1, Model("m", "two")).ok());
  // The first comes back with its old files: now it is the odd one.
  EXPECT_FALSE(router_.Connected(0, Model("m", "one")).ok());
}

TEST_F(RouterTest, ResolvesNames) {
  EXPECT_EQ(router_.Resolve("m").outcome, Outcome::kNotYet);
  EXPECT_EQ(router_.Resolve("").outcome, Outcome::kNotYet);
  BringUp(0, Model("m"));
  EXPECT_EQ(router_.Resolve("m").outcome, Outcome::kFound);
  EXPECT_EQ(router_.Resolve("").outcome, Outcome::kFound);
  EXPECT_EQ(router_.Resolve("x").outcome, Outcome::kNotYet);  // groups 1, 2 have not said
  BringUp(1, Model("n"));
  BringUp(2, Model("m"));
  EXPECT_EQ(router_.Resolve("x").outcome, Outcome::kUnknown);
  EXPECT_EQ(router_.Resolve("").outcome, Outcome::kAmbiguous);
  EXPECT_EQ(router_.Resolve("n").model->name(), "n");
}

TEST_F(RouterTest, ResolvesToTheFilesOfAReadyGroup) {
  BringUp(0, Model("m", "old"));
  router_.Lost(0);
  BringUp(1, Model("m", "new"));
  EXPECT_EQ(router_.Resolve("m").model->info.model_hash(), "new");
}

TEST_F(RouterTest, KnowsATokenizerByItsHash) {
  BringUp(0, Model("m", "h1"));
  EXPECT_NE(router_.WithTokenizer("h1"), nullptr);
  EXPECT_EQ(router_.WithTokenizer("h2"), nullptr);
  EXPECT_EQ(router_.WithTokenizer(""), nullptr);
}

class BreakerTest : public RouterTest {
 protected:
  void SetUp() override {
    BringUp(0, Model("m"));
    BringUp(1, Model("m"), 5);  // busier: taken only when 0 is not
  }
  void Fail(int times) {
    for (int i = 0; i < times; ++i) router_.RecordOutcome(0, true);
  }
  void PassTime(Duration time) {
    clock_.Advance(time);
    router_.Beat(0, Load(0));
    router_.Beat(1, Load(5));
  }
  size_t Picked() {
    const auto group = router_.Pick(*Model("m"), 1, std::nullopt);
    router_.Release(*group, 1);
    return *group;
  }
};

TEST_F(BreakerTest, OpensAfterFiveFailuresInARow) {
  Fail(4);
  router_.RecordOutcome(0, false);
  Fail(4);
  EXPECT_EQ(Picked(), 0U);
  Fail(1);
  EXPECT_EQ(Picked(), 1U);
  EXPECT_EQ(router_.Snapshot()[0].breaker, BreakerState::kOpen);
}

TEST_F(BreakerTest, ClosesAfterTwoSuccessesAndReopensLonger) {
  Fail(5);
  PassTime(std::chrono::seconds(5));
  EXPECT_EQ(router_.Snapshot()[0].breaker, BreakerState::kHalfOpen);
  EXPECT_EQ(Picked(), 0U);
  Fail(1);  // half open: one is enough, and now for ten seconds
  PassTime(std::chrono::seconds(9));
  EXPECT_EQ(Picked(), 1U);
  PassTime(std::chrono::seconds(1));
  EXPECT_EQ(Picked(), 0U);
  router_.RecordOutcome(0, false);
  EXPECT_EQ(router_.Snapshot()[0].breaker, BreakerState::kHalfOpen);
  router_.RecordOutcome(0, false);
  EXPECT_EQ(router_.Snapshot()[0].breaker, BreakerState::kClosed);
}

TEST_F(BreakerTest, NeverOpensLongerThanAMinute) {
  Fail(5);
  for (int i = 0; i < 10; ++i) {
    PassTime(std::chrono::seconds(60));
    ASSERT_EQ(router_.Snapshot()[0].breaker, BreakerState::kHalfOpen) << i;
    Fail(1);
  }
}

TEST_F(BreakerTest, TheLastGroupIsExempt) {
  Fail(5);
  router_.Lost(1);
  EXPECT_EQ(Picked(), 0U);
}

TEST(RetryBudget, IsAFifthOfTheActiveAndAtLeastThree) {
  RetryBudget budget;
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(budget.TryTake(1));
  EXPECT_FALSE(budget.TryTake(1));
  EXPECT_FALSE(budget.TryTake(19));
  EXPECT_TRUE(budget.TryTake(20));
  budget.Return();
  budget.Return();
  EXPECT_TRUE(budget.TryTake(1));
}

}  // namespace
}  // namespace nibble::gateway
