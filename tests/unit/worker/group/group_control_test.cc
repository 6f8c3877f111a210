#include "worker/group/group_control.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <thread>
#include <vector>

#include "base/exit_codes.h"
#include "worker/group/shared_memory.h"

namespace nibble::group {
namespace {

constexpr RankFacts kFacts{
    .model_hash = 1, .config_hash = 2, .build_hash = 3, .rank_count = 3, .kv_blocks = 100};

// Three ranks as threads. Each introduces itself with its facts; what came of it, by rank.
std::vector<absl::StatusOr<int32_t>> Meet(const std::vector<RankFacts>& facts) {
  const auto control = std::make_unique<GroupControl>();
  const SteadyClock clock;
  std::vector<absl::StatusOr<int32_t>> results(facts.size(), absl::UnknownError("never ran"));
  std::vector<std::thread> threads;
  for (size_t rank = 0; rank < facts.size(); ++rank) {
    threads.emplace_back([&, rank] {
      Handshake handshake(control.get(), static_cast<int32_t>(rank),
                          static_cast<int32_t>(facts.size()), &clock);
      results[rank] = handshake.Introduce(facts[rank], Deadline::max());
    });
  }
  for (std::thread& thread : threads) thread.join();
  return results;
}

TEST(Handshake, AgreesOnTheSmallestRanksBlocks) {
  std::vector<RankFacts> facts(3, kFacts);
  facts[1].kv_blocks = 70;
  facts[2].kv_blocks = 80;
  for (const auto& result : Meet(facts)) {
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(*result, 70);
  }
}

TEST(Handshake, NamesTheRankThatDiffersAndInWhat) {
  struct Case {
    void (*spoil)(RankFacts*);
    const char* what;
  };
  for (const Case& one : {Case{[](RankFacts* f) { f->model_hash = 9; }, "model"},
                          Case{[](RankFacts* f) { f->config_hash = 9; }, "configuration"},
                          Case{[](RankFacts* f) { f->build_hash = 9; }, "build"},
                          Case{[](RankFacts* f) { f->rank_count = 9; }, "number of ranks"}}) {
    std::vector<RankFacts> facts(3, kFacts);
    one.spoil(&facts[2]);
    for (const auto& result : Meet(facts)) {
      EXPECT_EQ(result.status().code(), absl::StatusCode::kFailedPrecondition);
      EXPECT_THAT(std::string(result.status().message()),
                  testing::AllOf(testing::HasSubstr("rank 2"), testing::HasSubstr(one.what)));
    }
  }
}

TEST(Handshake, NamesTheRankThatDoesNotCome) {
  const auto control = std::make_unique<GroupControl>();
  ManualClock clock;
  Handshake handshake(control.get(), 0, 2, &clock);
  const auto result = handshake.Introduce(kFacts, clock.Now());
  EXPECT_EQ(result.status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(result.status().message()), testing::HasSubstr("rank 1"));
}

TEST(Handshake, WaitsUntilAllHaveLoaded) {
  const auto control = std::make_unique<GroupControl>();
  const SteadyClock clock;
  std::thread other([&] {
    Handshake handshake(control.get(), 1, 2, &clock);
    EXPECT_TRUE(handshake.AwaitLoaded(Deadline::max()).ok());
  });
  Handshake handshake(control.get(), 0, 2, &clock);
  EXPECT_TRUE(handshake.AwaitLoaded(Deadline::max()).ok());
  EXPECT_EQ(control->ranks[1].phase.load(), RankPhase::kLoaded);
  other.join();
}

TEST(ExitReason, TheFirstOneStaysAndIsCutToFit) {
  const auto slot = std::make_unique<RankSlot>();
  SetExitReason(slot.get(), kExitModel, std::string(2000, 'x'));
  SetExitReason(slot.get(), kExitHang, "later");
  EXPECT_EQ(slot->exit_code.load(), kExitModel);
  EXPECT_EQ(slot->exit_reason.Get(), std::string(500, 'x'));
}

TEST(SharedText, NonsenseInTheSharedMemoryReadsAsNothing) {
  SharedText<8> text;
  EXPECT_FALSE(text.Get().has_value());
  text.size_plus_one = 4'000'000'000;
  EXPECT_FALSE(text.Get().has_value());
}

TEST(SharedObject, IsSeenByWhoeverHoldsTheDescriptor) {
  auto first = SharedObject<step::GroupStats>::Create("test");
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ((*first)->engine.requests_running.Get(), 0);
  auto second = SharedObject<step::GroupStats>::Attach(::dup(first->fd()));
  ASSERT_TRUE(second.ok()) << second.status();
  (*first)->engine.requests_running.Set(7);
  EXPECT_EQ((*second)->engine.requests_running.Get(), 7);
  EXPECT_NE(::ftruncate(first->fd(), 0), 0);  // nobody can pull it away
}

TEST(SharedObject, RefusesADescriptorOfSomethingElse) {
  EXPECT_FALSE(SharedObject<step::GroupStats>::Attach(::open("/dev/null", O_RDWR)).ok());
  auto other = SharedObject<GroupControl>::Create("test");
  ASSERT_TRUE(other.ok());
  EXPECT_FALSE(SharedObject<step::GroupStats>::Attach(::dup(other->fd())).ok());
  const int unsealed = ::memfd_create("unsealed", MFD_ALLOW_SEALING);
  ASSERT_EQ(::ftruncate(unsealed, sizeof(step::GroupStats)), 0);
  EXPECT_FALSE(SharedObject<step::GroupStats>::Attach(unsealed).ok());
}

}  // namespace
}  // namespace nibble::group
