// Which group takes a request: the least loaded, one that works, and the last one whatever it does.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/integration/gateway/gateway_fixture.h"

namespace nibble::gateway {
namespace {

namespace wire = worker::v1;
using absl::StatusCode;

class RoutingTest : public GatewayFixture {
 protected:
  static Script Fail() {
    return [](ScriptedCall*) { return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone"); };
  }
  // The worker tells this load, and the gateway has heard it.
  void Report(size_t worker, uint32_t running) {
    wire::Load load;
    load.set_ready(true);
    load.set_running(running);
    workers_[worker]->SetLoad(load);
    EXPECT_TRUE(WaitUntil([&] { return Group(worker).load.running() == running; }));
  }
  GroupSnapshot Group(size_t group) { return server_->core().router.Snapshot()[group]; }
};

TEST_F(RoutingTest, RequestsGoWhereTheLeadersSayThereIsRoom) {
  StartWith(2);
  Report(0, 12);
  for (int i = 0; i < 5; ++i) EXPECT_EQ(Run(Request("hello", 3)).trailers.at("x-group"), "g1");
  Report(1, 15);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(Run(Request("hello", 3)).trailers.at("x-group"), "g0");
}

TEST_F(RoutingTest, RequestsUnderWayCountBeforeTheLeadersSaySo) {
  StartWith(2);  // both go on saying that nothing runs
  std::atomic<bool> release{false};
  std::atomic<int> speaking{0};
  for (auto& worker : workers_) {
    worker->SetScript([&](ScriptedCall* call) {
      call->Admit();
      call->SayLetters(0, 1);
      call->WaitFor(release);
      call->SayLetters(1, call->request.max_tokens());
      call->Finish(wire::FINISH_REASON_LENGTH);
      return grpc::Status::OK;
    });
  }
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([&] {
      EXPECT_TRUE(Run(Request("hello", 3), std::chrono::seconds(20), &speaking).status.ok());
    });
    EXPECT_TRUE(WaitUntil([&] { return speaking == i + 1; }));
  }
  EXPECT_EQ(workers_[0]->active(), 4);
  EXPECT_EQ(workers_[1]->active(), 4);
  release = true;
  for (std::thread& client : clients) client.join();
}

TEST_F(RoutingTest, GroupThatFailsIsLeftAloneAndTriedAgainLater) {
  GatewayOptions options;
  options.router.breaker_open = std::chrono::milliseconds(300);
  StartWith(2, options);
  workers_[0]->SetScript(Fail());
  Report(1, 1);  // the failing one looks better
  EXPECT_TRUE(WaitUntil([&] {
    EXPECT_TRUE(Run(Request("hello", 3)).status.ok());
    return Group(0).breaker == BreakerState::kOpen;
  }));
  EXPECT_GE(workers_[0]->requests().size(), 5U);
  workers_[0]->SetScript(SpeakLetters());
  EXPECT_TRUE(WaitUntil([&] {
    EXPECT_TRUE(Run(Request("hello", 3)).status.ok());
    return Group(0).breaker == BreakerState::kClosed;
  }));
}

TEST_F(RoutingTest, TheLastGroupIsNeverEjected) {
  StartWith(1);
  workers_[0]->SetScript(Fail());
  for (int i = 0; i < 8; ++i) {
    const Transcript got = Run(Request("hello", 3));
    EXPECT_EQ(got.status.code(), StatusCode::kUnavailable);
    EXPECT_TRUE(got.trailers.contains("grpc-retry-pushback-ms"));
  }
  EXPECT_EQ(Group(0).breaker, BreakerState::kOpen);
  EXPECT_EQ(workers_[0]->requests().size(), 8U);
  workers_[0]->SetScript(SpeakLetters());
  EXPECT_TRUE(Run(Request("hello", 3)).status.ok());
}

TEST_F(RoutingTest, FullGroupsAreRefusedBeforeAnybodyIsAsked) {
  workers_.push_back(std::make_unique<ScriptedWorker>());
  workers_[0]->info.set_max_sequences(1);
  workers_[0]->info.set_queue_size(1);
  wire::Load load;
  load.set_ready(true);
  load.set_running(1);
  load.set_waiting(1);
  workers_[0]->SetLoad(load);
  workers_[0]->Start();
  GatewayOptions options;
  options.groups = {workers_[0]->address()};
  StartGateway(std::move(options));
  ASSERT_TRUE(WaitUntil([&] { return ReadyGroups() == 1; }));
  std::atomic<bool> go{false};
  workers_[0]->SetScript([&](ScriptedCall* call) {
    call->Admit();
    EXPECT_TRUE(call->WaitFor(go));
    call->SayLetters(0, 2);
    call->Finish(wire::FINISH_REASON_LENGTH);
    return grpc::Status::OK;
  });
  const auto open = [this](grpc::ClientContext* context) {
    auto reader = stub_->GenerateStream(context, Request("hello", 2));
    pb::GenerateStreamResponse started;
    EXPECT_TRUE(reader->Read(&started));
    return reader;
  };
  grpc::ClientContext contexts[2];
  auto running = open(&contexts[0]);
  auto waiting = open(&contexts[1]);
  const Transcript got = Run(Request("hello", 2));
  EXPECT_EQ(got.status.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(got.status), "QUEUE_FULL");
  EXPECT_EQ(got.trailers.at("grpc-retry-pushback-ms"), "-1");
  EXPECT_EQ(workers_[0]->requests().size(), 2U);
  go.store(true);
  for (auto* reader : {running.get(), waiting.get()}) {
    pb::GenerateStreamResponse response;
    while (reader->Read(&response)) {
    }
    EXPECT_TRUE(reader->Finish().ok());
  }
  EXPECT_TRUE(Run(Request("hello", 2)).status.ok());
}

}  // namespace
}  // namespace nibble::gateway
