#include "worker/follower.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

namespace nibble::worker {
namespace {

// Both ends of a follower: says which messages come, notes what it does with them.
class Script final : public step::PlanReceiver, public step::Executor {
 public:
  explicit Script(ManualClock* clock) : clock_(clock) {}

  absl::StatusOr<step::PlanMessage> Receive(Deadline deadline, step::StepPlan* plan,
                                            step::MaskBatch* /*masks*/) override {
    if (messages_.empty()) return absl::DataLossError("the script is over");
    const std::string message = messages_.front();
    messages_.erase(messages_.begin());
    if (message == "nothing") {
      clock_->Advance(deadline - clock_->Now());
      return absl::DeadlineExceededError("nothing came");
    }
    if (message == "stop") return step::PlanMessage::kStop;
    if (message == "masks") return step::PlanMessage::kMasks;
    plan->step_id = ++received_;
    return step::PlanMessage::kStep;
  }
  absl::Status Launch(const step::StepPlan& plan) override {
    log_ += " L" + std::to_string(plan.step_id);
    return launch_status_;
  }
  absl::Status ProvideMasks(const step::MaskBatch& /*masks*/) override {
    log_ += " M";
    return absl::OkStatus();
  }
  absl::Status Wait(Deadline deadline, step::StepResult* /*result*/) override {
    log_ += " W" + std::to_string(++waited_);
    wait_deadline_ = deadline;
    return wait_status_;
  }
  const step::ExecutorLimits& limits() const override { return limits_; }

  ManualClock* clock_;
  std::vector<std::string> messages_;
  absl::Status launch_status_, wait_status_;
  std::string log_;
  Deadline wait_deadline_{};
  uint64_t received_ = 0, waited_ = 0;
  step::ExecutorLimits limits_;
};

class FollowerTest : public ::testing::Test {
 protected:
  absl::Status Run(std::vector<std::string> messages) {
    script_.messages_ = std::move(messages);
    return RunFollower(
        &script_, &script_,
        {.step_deadline = std::chrono::seconds(7), .clock = &clock_, .stats = &stats_});
  }
  ManualClock clock_;
  Script script_{&clock_};
  step::RankStats stats_;
};

TEST_F(FollowerTest, RunsOneStepAheadAndLeavesNothingBehind) {
  EXPECT_TRUE(Run({"step", "step", "masks", "step", "stop"}).ok());
  EXPECT_EQ(script_.log_, " L1 L2 M W1 L3 W2 W3");
  EXPECT_EQ(script_.wait_deadline_, clock_.Now() + std::chrono::seconds(7));
}

TEST_F(FollowerTest, WaitsLongerForTheFirstStepsOfAGroupThatWarmsUp) {
  script_.messages_ = {"step", "stop"};
  const FollowerOptions options = {.step_deadline = std::chrono::seconds(7),
                                   .serving = [] { return false; },
                                   .warm_up_deadline = std::chrono::seconds(90),
                                   .clock = &clock_,
                                   .stats = &stats_};
  EXPECT_TRUE(RunFollower(&script_, &script_, options).ok());
  EXPECT_EQ(script_.wait_deadline_, clock_.Now() + std::chrono::seconds(90));
}

TEST_F(FollowerTest, LooksAtTheLastStepsResultWhenNothingFollows) {
  EXPECT_TRUE(Run({"step", "nothing", "step", "stop"}).ok());
  EXPECT_EQ(script_.log_, " L1 W1 L2 W2");
}

TEST_F(FollowerTest, ShowsThatItLivesWhileIdle) {
  EXPECT_TRUE(Run({"nothing", "nothing", "nothing", "stop"}).ok());
  EXPECT_EQ(stats_.progress_ns.Get(), clock_.Now().time_since_epoch().count());
  EXPECT_EQ(clock_.Now(), Deadline(std::chrono::milliseconds(1500)));
}

TEST_F(FollowerTest, EndsWithTheExecutorsError) {
  script_.wait_status_ = absl::AbortedError("a peer is gone");
  EXPECT_EQ(Run({"step", "step", "step", "stop"}).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(script_.log_, " L1 L2 W1");
}

TEST_F(FollowerTest, EndsWithTheChannelsError) {
  EXPECT_EQ(Run({"step"}).code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace nibble::worker
