// What is sent again, what is not, and how many at a time.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <string>

#include "tests/integration/gateway/gateway_fixture.h"

namespace nibble::gateway {
namespace {

using absl::StatusCode;
using RetryTest = GatewayFixture;

TEST_F(RetryTest, RefusalsSayNothingAboutTheGroup) {
  StartWith(2);
  for (const auto code : {grpc::StatusCode::INVALID_ARGUMENT, grpc::StatusCode::RESOURCE_EXHAUSTED,
                          grpc::StatusCode::NOT_FOUND}) {
    for (auto& worker : workers_) {
      worker->SetScript([code](ScriptedCall*) { return grpc::Status(code, "no"); });
    }
    for (int i = 0; i < 12; ++i) {
      EXPECT_EQ(static_cast<int>(Run(Request("hello", 5)).status.code()), static_cast<int>(code));
    }
  }
  EXPECT_EQ(workers_[0]->requests().size() + workers_[1]->requests().size(), 36U);  // none twice
  for (const GroupSnapshot& group : server_->core().router.Snapshot()) {
    EXPECT_EQ(group.breaker, BreakerState::kClosed);
  }
}

TEST_F(RetryTest, SecondAttemptsStayWithinTheirBudget) {
  constexpr int kClients = 10;  // a fifth would be two: three are allowed
  StartWith(2);
  std::atomic<int> attempts{0};
  std::atomic<bool> all_there{false};
  std::atomic<bool> release{false};
  for (auto& worker : workers_) {
    worker->SetScript([&](ScriptedCall* call) {
      if (attempts.fetch_add(1) >= kClients) {
        call->WaitFor(release);
        return SpeakLetters()(call);
      }
      call->WaitFor(all_there);
      return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone");
    });
  }
  std::atomic<int> failed{0};
  std::atomic<int> answered{0};
  std::vector<std::thread> clients;
  clients.reserve(kClients);
  for (int i = 0; i < kClients; ++i) {
    clients.emplace_back([&] {
      const Transcript got = Run(Request("hello", 5));
      if (got.status.ok()) {
        ++answered;
        return;
      }
      EXPECT_EQ(ErrorReason(got.status), "NO_WORKER") << got.status;
      ++failed;
    });
  }
  EXPECT_TRUE(WaitUntil([&] { return attempts == kClients; }));
  all_there = true;
  EXPECT_TRUE(WaitUntil([&] { return failed == kClients - 3; }));
  release = true;
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(answered, 3);
  EXPECT_EQ(attempts, kClients + 3);
  EXPECT_EQ(server_->core().metrics.retries_worker_lost->Value(), 3);
}

// A rolling update: more requests than the budget meet a group that drains before it has told.
TEST_F(RetryTest, WhatALeavingGroupRefusesGoesElsewhereWithoutABudget) {
  constexpr int kClients = 20;
  StartWith(2);
  std::atomic<int> refused{0};
  std::atomic<bool> all_there{false};
  workers_[0]->SetScript([&](ScriptedCall* call) {
    ++refused;
    call->WaitFor(all_there);
    absl::Status status = absl::UnavailableError("the worker drains");
    SetErrorInfo(&status, reason::kDraining);
    return ToGrpcStatus(status);
  });
  std::vector<std::thread> clients;
  clients.reserve(kClients);
  for (int i = 0; i < kClients; ++i) {
    clients.emplace_back([&] { EXPECT_TRUE(Run(Request("hello", 5)).status.ok()); });
  }
  EXPECT_TRUE(WaitUntil([&] { return refused >= 6; }));
  all_there = true;
  for (std::thread& client : clients) client.join();
  EXPECT_GT(server_->core().metrics.retries_worker_lost->Value(), 4);  // the budget
  EXPECT_EQ(server_->core().router.Snapshot()[0].breaker, BreakerState::kClosed);
}

TEST_F(RetryTest, NothingIsSentAgainWhenTheDeadlineHasPassed) {
  StartWith(2);
  std::atomic<int> attempts{0};
  for (auto& worker : workers_) {
    worker->SetScript([&](ScriptedCall* call) {
      ++attempts;
      EXPECT_TRUE(call->WaitForCancel());
      return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone");
    });
  }
  EXPECT_EQ(Run(Request("hello", 5), std::chrono::milliseconds(800)).status.code(),
            StatusCode::kDeadlineExceeded);
  EXPECT_TRUE(WaitUntil([&] { return workers_[0]->active() + workers_[1]->active() == 0; }));
  EXPECT_EQ(attempts, 1);
}

// Refused before any worker hears of it, and counted.
TEST_F(RetryTest, FullTokenizingQueueIsOverloaded) {
  GatewayOptions options;
  options.limits.tokenize_queue = 0;
  StartWith(1, options);
  const Transcript got = Run(Request("hello", 5));
  EXPECT_EQ(got.status.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(got.status), "OVERLOADED");
  EXPECT_EQ(got.trailers.at("grpc-retry-pushback-ms"), "-1");
  EXPECT_TRUE(workers_[0]->requests().empty());
  EXPECT_EQ(server_->core().metrics.rejected[static_cast<size_t>(Rejection::kOverloaded)]->Value(),
            1);
}

}  // namespace
}  // namespace nibble::gateway
