#include "worker/group/hang_watch.h"

#include <gtest/gtest.h>

#include <memory>

namespace nibble::group {
namespace {

using std::chrono::seconds;
using Verdict = HangWatch::Verdict;

// Two ranks, soft limit 5 s, hard limit 10 s; time in whole seconds.
class HangWatchTest : public testing::Test {
 protected:
  HangWatchTest() : stats_(std::make_unique<step::GroupStats>()) {
    stats_->ranks[0].up.Set(1);
    stats_->ranks[1].up.Set(1);
  }

  void Stamp(int rank) { stats_->ranks[static_cast<size_t>(rank)].progress_ns.Set(Now()); }
  void SetWork(bool work) { stats_->engine.requests_running.Set(work ? 1 : 0); }
  [[nodiscard]] int64_t Now() const { return Deadline(now_).time_since_epoch().count(); }

  // Lets `duration` pass second by second; the last finding.
  HangWatch::Finding Pass(int count) {
    HangWatch::Finding finding;
    for (int i = 0; i < count; ++i) {
      now_ += seconds(1);
      if (follower_alive_) Stamp(1);
      if (leader_alive_) Stamp(0);
      finding = watch_.Observe(now_, *stats_);
    }
    return finding;
  }

  std::unique_ptr<step::GroupStats> stats_;
  HangWatch watch_{HangWatchOptions{}, 2};
  Deadline now_{seconds(1000)};
  bool leader_alive_ = true;
  bool follower_alive_ = true;
};

TEST_F(HangWatchTest, AnIdleLeaderIsNeverLate) {
  leader_alive_ = false;
  EXPECT_EQ(Pass(100).verdict, Verdict::kFine);
}

TEST_F(HangWatchTest, WorkAfterALongIdleTimeStartsTheCountAnew) {
  leader_alive_ = false;
  Pass(100);
  SetWork(true);
  EXPECT_EQ(Pass(4).verdict, Verdict::kFine);
  EXPECT_EQ(Pass(2).verdict, Verdict::kSoft);
  const HangWatch::Finding finding = Pass(5);
  EXPECT_EQ(finding.verdict, Verdict::kHard);
  EXPECT_EQ(finding.rank, 0);
  EXPECT_GE(finding.age, seconds(10));
}

TEST_F(HangWatchTest, ALongPrefillThatStampsItsLayersIsNoHang) {
  SetWork(true);
  EXPECT_EQ(Pass(100).verdict, Verdict::kFine);
}

TEST_F(HangWatchTest, ARetiredStepIsProgressToo) {
  SetWork(true);
  leader_alive_ = false;
  for (int i = 0; i < 20; ++i) {
    stats_->engine.last_step_ns.Set(Now());
    EXPECT_EQ(Pass(4).verdict, Verdict::kFine);
  }
}

TEST_F(HangWatchTest, AFollowerThatStopsStampingIsLateEvenWithoutWork) {
  Pass(1);
  follower_alive_ = false;
  EXPECT_EQ(Pass(4).verdict, Verdict::kFine);
  EXPECT_EQ(Pass(1).verdict, Verdict::kSoft);
  const HangWatch::Finding finding = Pass(5);
  EXPECT_EQ(finding.verdict, Verdict::kHard);
  EXPECT_EQ(finding.rank, 1);
}

TEST_F(HangWatchTest, ARankThatIsNotUpIsNotLate) {
  stats_->ranks[1].up.Set(0);
  follower_alive_ = false;
  EXPECT_EQ(Pass(100).verdict, Verdict::kFine);
}

TEST_F(HangWatchTest, ProgressEndsASoftFinding) {
  SetWork(true);
  Pass(1);
  leader_alive_ = false;
  EXPECT_EQ(Pass(7).verdict, Verdict::kSoft);
  leader_alive_ = true;
  EXPECT_EQ(Pass(1).verdict, Verdict::kFine);
}

TEST_F(HangWatchTest, AFrozenMachineThatThawsIsNoHang) {
  SetWork(true);
  Pass(1);
  now_ += seconds(60);  // nobody ran, the watch neither
  EXPECT_EQ(watch_.Observe(now_, *stats_).verdict, Verdict::kFine);
  EXPECT_EQ(Pass(3).verdict, Verdict::kFine);
}

}  // namespace
}  // namespace nibble::group
