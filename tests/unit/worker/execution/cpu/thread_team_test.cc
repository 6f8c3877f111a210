#include "worker/execution/cpu/thread_team.h"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

namespace nibble::execution {
namespace {

// Every thread adds to its own counter, then after a barrier reads all of them.
class Rounds final : public ThreadTeam::Task {
 public:
  Rounds(ThreadTeam* team, int32_t rounds)
      : team_(team), rounds_(rounds), counts_(static_cast<size_t>(team->threads())) {}

  void RunThread(int32_t thread) override {
    for (int32_t round = 1; round <= rounds_; ++round) {
      counts_[static_cast<size_t>(thread)] = round;
      team_->Barrier(thread);
      for (const int32_t count : counts_) {
        if (count != round) errors_.fetch_add(1);
      }
      team_->Barrier(thread);
    }
    runs_.fetch_add(1);
  }

  [[nodiscard]] int32_t errors() const { return errors_.load(); }
  [[nodiscard]] int32_t runs() const { return runs_.load(); }

 private:
  ThreadTeam* const team_;
  const int32_t rounds_;
  std::vector<int32_t> counts_;  // not atomic: the barrier must order them
  std::atomic<int32_t> errors_{0};
  std::atomic<int32_t> runs_{0};
};

class ThreadTeamTest : public ::testing::TestWithParam<std::tuple<int32_t, Duration>> {};

TEST_P(ThreadTeamTest, BarriersSeparateTheStages) {
  const auto [threads, spin] = GetParam();
  ThreadTeam team(threads, spin);
  Rounds task(&team, 50);
  for (int32_t run = 1; run <= 20; ++run) {
    team.Run(&task);
    ASSERT_EQ(task.runs(), run * threads);
  }
  EXPECT_EQ(task.errors(), 0);
}

INSTANTIATE_TEST_SUITE_P(All, ThreadTeamTest,
                         ::testing::Combine(::testing::Values(1, 2, 3, 8),
                                            ::testing::Values(Duration::zero(),
                                                              collectives::kSpinMax)));

TEST(ThreadTeamTest, EndsWithoutEverRunning) { ThreadTeam team(4, Duration::zero()); }

TEST(ShareOfTest, SharesCoverEverythingOnce) {
  for (int32_t count = 0; count < 20; ++count) {
    for (int32_t threads = 1; threads < 9; ++threads) {
      int32_t next = 0;
      for (int32_t thread = 0; thread < threads; ++thread) {
        const cpu::BlockRange share = ShareOf(count, thread, threads);
        EXPECT_EQ(share.begin, next);
        EXPECT_LE(share.end - share.begin, (count + threads - 1) / threads);
        next = share.end;
      }
      EXPECT_EQ(next, count);
    }
  }
}

}  // namespace
}  // namespace nibble::execution
