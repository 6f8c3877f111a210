// Every implementation, ranks as threads: the same sums, gathers and broadcasts, bit for bit.
#include "worker/collectives/communicator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "tests/unit/worker/collectives/ranks_as_threads.h"
#include "worker/collectives/gloo_communicator.h"
#include "worker/collectives/self_communicator.h"
#include "worker/collectives/shm_communicator.h"
#include "worker/collectives/store.h"

namespace nibble::collectives {
namespace {

constexpr int64_t kSmallSlot = 256;  // so that ordinary messages travel in pieces
constexpr uint64_t kGroupKey = 77;

// A group of ranks in this process.
class Group {
 public:
  Group(const std::string& kind, int32_t ranks, Duration timeout = std::chrono::seconds(10))
      : communicators_(static_cast<size_t>(ranks)) {
    if (kind == "self") {
      communicators_[0] = MakeSelfCommunicator();
    } else if (kind == "shm") {
      MakeShm(ranks, timeout);
    } else {
      MakeGloo(ranks, timeout);
    }
  }

  Communicator& operator[](int32_t rank) { return *communicators_[static_cast<size_t>(rank)]; }
  int32_t size() const { return static_cast<int32_t>(communicators_.size()); }

 private:
  void MakeShm(int32_t ranks, Duration timeout) {
    auto region = ShmRegion::Create(ranks, kSmallSlot);
    ASSERT_TRUE(region.ok()) << region.status();
    region_ = std::make_unique<ShmRegion>(std::move(*region));
    for (int32_t rank = 0; rank < ranks; ++rank) {
      auto made = MakeShmCommunicator(region_.get(), rank, {.timeout = timeout});
      ASSERT_TRUE(made.ok()) << made.status();
      communicators_[static_cast<size_t>(rank)] = std::move(*made);
    }
  }

  void MakeGloo(int32_t ranks, Duration timeout) {
    auto store = StoreServer::Listen({.group_key = kGroupKey});
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = std::move(*store);
    RunRanks(ranks, [&](int32_t rank) {
      auto made = MakeGlooCommunicator({.rank = rank,
                                        .size = ranks,
                                        .store_host = "127.0.0.1",
                                        .store_port = store_->port(),
                                        .group_key = kGroupKey,
                                        .timeout = timeout});
      ASSERT_TRUE(made.ok()) << made.status();
      communicators_[static_cast<size_t>(rank)] = std::move(*made);
    });
  }

  std::unique_ptr<StoreServer> store_;
  std::unique_ptr<ShmRegion> region_;
  std::vector<std::unique_ptr<Communicator>> communicators_;
};

// Values whose sum depends on the order in which it is taken.
std::vector<float> Values(int32_t rank, size_t count) {
  std::mt19937 random(static_cast<uint32_t>(rank) * 1000 + static_cast<uint32_t>(count));
  std::uniform_real_distribution<float> exponent(-8, 8);
  std::vector<float> values(count);
  for (float& value : values) {
    value = std::exp2(exponent(random)) * (random() % 2 == 0 ? 1.0f : -1.0f);
  }
  return values;
}

class CommunicatorTest : public ::testing::TestWithParam<std::tuple<std::string, int32_t>> {
 protected:
  CommunicatorTest() : group_(std::get<0>(GetParam()), std::get<1>(GetParam())) {}
  Group group_;
};

TEST_P(CommunicatorTest, SumsInRankOrderOnEveryRank) {
  for (const size_t count :
       {size_t{1}, size_t{63}, size_t{64}, size_t{65}, size_t{577}, size_t{70'001}}) {
    std::vector<float> expected = Values(0, count);
    for (int32_t rank = 1; rank < group_.size(); ++rank) {
      const std::vector<float> part = Values(rank, count);
      for (size_t i = 0; i < count; ++i) expected[i] += part[i];
    }
    RunRanks(group_.size(), [&](int32_t rank) {
      std::vector<float> data = Values(rank, count);
      const absl::Status status = group_[rank].AllReduceSum(data);
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(0, std::memcmp(data.data(), expected.data(), count * sizeof(float)))
          << "rank " << rank << ", " << count << " values";
    });
  }
}

TEST_P(CommunicatorTest, GathersInRankOrder) {
  for (const size_t count : {size_t{1}, size_t{255}, size_t{256}, size_t{1000}, size_t{300'007}}) {
    RunRanks(group_.size(), [&](int32_t rank) {
      std::vector<std::byte> mine(count), all(count * static_cast<size_t>(group_.size()));
      for (size_t i = 0; i < count; ++i) mine[i] = std::byte(i * 7 + static_cast<size_t>(rank));
      const absl::Status status = group_[rank].AllGather(mine, all);
      ASSERT_TRUE(status.ok()) << status;
      for (size_t at = 0; at < all.size(); ++at) {
        ASSERT_EQ(all[at], std::byte((at % count) * 7 + at / count)) << at;
      }
    });
  }
}

TEST_P(CommunicatorTest, BroadcastsFromAnyRoot) {
  for (int32_t root = 0; root < group_.size(); ++root) {
    RunRanks(group_.size(), [&](int32_t rank) {
      std::vector<std::byte> data(1001, std::byte(rank == root ? 42 : 0));
      const absl::Status status = group_[rank].Broadcast(data, root);
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(data, std::vector<std::byte>(1001, std::byte(42)));
    });
  }
}

TEST_P(CommunicatorTest, ManyMixedRoundsStayInStep) {
  RunRanks(group_.size(), [&](int32_t rank) {
    for (int32_t turn = 0; turn < 200; ++turn) {
      std::vector<float> data(static_cast<size_t>(turn) + 1, static_cast<float>(rank + turn));
      ASSERT_TRUE(group_[rank].AllReduceSum(data).ok());
      float expected = 0;
      for (int32_t peer = 0; peer < group_.size(); ++peer) {
        expected += static_cast<float>(peer + turn);
      }
      ASSERT_EQ(data.back(), expected);
      const std::byte mine{static_cast<uint8_t>(rank + turn)};
      std::vector<std::byte> all(static_cast<size_t>(group_.size()));
      ASSERT_TRUE(group_[rank].AllGather({&mine, 1}, all).ok());
      ASSERT_EQ(all.back(), std::byte(group_.size() - 1 + turn));
    }
  });
}

TEST_P(CommunicatorTest, AddsAndNormalises) {
  constexpr size_t kTokens = 3, kHidden = 40;
  RunRanks(group_.size(), [&](int32_t rank) {
    std::vector<float> partial = Values(rank, kTokens * kHidden);
    std::vector<float> residual = Values(100, kTokens * kHidden);
    const std::vector<float> weight = Values(101, kHidden);
    std::vector<float> normed(kTokens * kHidden);
    std::vector<double> expected(residual.begin(), residual.end());
    for (int32_t peer = 0; peer < group_.size(); ++peer) {
      const std::vector<float> part = Values(peer, kTokens * kHidden);
      for (size_t i = 0; i < part.size(); ++i) expected[i] += part[i];
    }
    const absl::Status status = group_[rank].AllReduceAddNorm({.partial = partial,
                                                               .residual = residual,
                                                               .norm_weight = weight,
                                                               .normed = normed,
                                                               .epsilon = 1e-5f});
    ASSERT_TRUE(status.ok()) << status;
    for (size_t token = 0; token < kTokens; ++token) {
      double squares = 0;
      for (size_t i = 0; i < kHidden; ++i) squares += std::pow(expected[token * kHidden + i], 2);
      const double factor = 1 / std::sqrt(squares / kHidden + 1e-5);
      for (size_t i = 0; i < kHidden; ++i) {
        const size_t at = token * kHidden + i;
        EXPECT_NEAR(residual[at], expected[at], 1e-3);
        EXPECT_NEAR(normed[at], expected[at] * factor * weight[i], 1e-3);
      }
    }
  });
}

TEST_P(CommunicatorTest, AbortEndsLaterCalls) {
  group_[group_.size() - 1].Abort();
  std::vector<float> data(8, 1.0f);
  const int32_t last = group_.size() - 1;
  EXPECT_EQ(group_[last].AllReduceSum(data).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(group_[0].AllReduceSum(data).code(), absl::StatusCode::kAborted);
}

INSTANTIATE_TEST_SUITE_P(All, CommunicatorTest,
                         ::testing::Values(std::tuple("self", 1), std::tuple("shm", 1),
                                           std::tuple("shm", 2), std::tuple("shm", 3),
                                           std::tuple("shm", 4), std::tuple("shm", 5),
                                           std::tuple("gloo", 2), std::tuple("gloo", 3),
                                           std::tuple("gloo", 4)),
                         [](const auto& test) {
                           return std::get<0>(test.param) + std::to_string(std::get<1>(test.param));
                         });

class WaitingTest : public ::testing::TestWithParam<std::string> {};

TEST_P(WaitingTest, AbortWakesAWaitingRank) {
  Group group(GetParam(), 3);
  RunRanks(3, [&](int32_t rank) {
    if (rank == 2) {
      group[rank].Abort();
      return;
    }
    std::vector<float> data(8, 1.0f);
    EXPECT_EQ(group[rank].AllReduceSum(data).code(), absl::StatusCode::kAborted);
  });
}

TEST_P(WaitingTest, AMissingPeerEndsInDeadlineExceeded) {
  Group group(GetParam(), 2, std::chrono::milliseconds(50));
  std::vector<float> data(8, 1.0f);
  EXPECT_EQ(group[0].AllReduceSum(data).code(), absl::StatusCode::kDeadlineExceeded);
  // The group is finished: the peer that comes late learns it too.
  EXPECT_EQ(group[1].AllReduceSum(data).code(), absl::StatusCode::kAborted);
  EXPECT_EQ(group[0].AllReduceSum(data).code(), absl::StatusCode::kAborted);
}

INSTANTIATE_TEST_SUITE_P(All, WaitingTest, ::testing::Values("shm", "gloo"),
                         [](const auto& test) { return test.param; });

TEST(ShmCommunicatorTest, DifferentCallsAreNoticed) {
  Group group("shm", 2);
  RunRanks(2, [&](int32_t rank) {
    std::vector<float> data(rank == 0 ? 8 : 9, 1.0f);
    const absl::Status status = group[rank].AllReduceSum(data);
    EXPECT_FALSE(status.ok());
  });
}

TEST(ShmCommunicatorTest, ARankAttachesOnce) {
  auto region = ShmRegion::Create(2, kSmallSlot);
  ASSERT_TRUE(region.ok());
  const auto first = MakeShmCommunicator(&*region, 1, {});
  EXPECT_TRUE(first.ok());
  EXPECT_EQ(MakeShmCommunicator(&*region, 1, {}).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(MakeShmCommunicator(&*region, 2, {}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(GlooCommunicatorTest, AMissingRankFailsTheConnection) {
  auto store = StoreServer::Listen({.group_key = kGroupKey});
  ASSERT_TRUE(store.ok());
  const auto made = MakeGlooCommunicator({.rank = 0,
                                          .size = 2,
                                          .store_host = "127.0.0.1",
                                          .store_port = (*store)->port(),
                                          .group_key = kGroupKey,
                                          .connect_timeout = std::chrono::milliseconds(200)});
  EXPECT_EQ(made.status().code(), absl::StatusCode::kDeadlineExceeded) << made.status();
}

}  // namespace
}  // namespace nibble::collectives
