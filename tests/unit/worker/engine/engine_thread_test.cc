// The engine's loop on its own thread, with others submitting and cancelling.
#include <unistd.h>

#include <atomic>
#include <random>
#include <thread>

#include "gtest/gtest.h"
#include "tests/support/checking_sink.h"
#include "tests/support/fake_executor.h"
#include "worker/engine/engine.h"
#include "worker/step/plan_ring.h"

namespace nibble::engine {
namespace {

using testing::CheckingSink;

constexpr step::ExecutorLimits kLimits = {
    .vocab_size = 500, .max_context = 128, .max_slots = 8, .max_step_tokens = 64, .kv_blocks = 24};

Request RandomRequest(std::mt19937_64& random) {
  Request request;
  request.seed = random();
  request.prompt.resize(1 + random() % 60);
  for (int32_t& id : request.prompt) id = static_cast<int32_t>(random() % 500);
  request.max_tokens = 1 + static_cast<int32_t>(random() % 40);
  if (random() % 2 == 0) request.stop_ids = {static_cast<int32_t>(random() % 500)};
  return request;
}

std::shared_ptr<CheckingSink> SinkFor(const Request& request) {
  const int32_t left = 128 - static_cast<int32_t>(request.prompt.size());
  return std::make_shared<CheckingSink>(request, 500, std::min(request.max_tokens, left));
}

class RunningEngine {
 public:
  explicit RunningEngine(step::PlanPublisher* publisher = nullptr)
      : engine_(Engine::Create({.queue_size = 16}, &executor_, publisher, &clock_, &stats_)),
        thread_([this] { status_ = engine_->Run(); }) {}
  ~RunningEngine() { EXPECT_EQ(Stop(), absl::OkStatus()); }
  Engine& operator*() { return *engine_; }
  Engine* operator->() { return engine_.get(); }
  step::EngineStats& stats() { return stats_; }
  absl::Status Stop() {
    if (thread_.joinable()) {
      engine_->Stop();
      thread_.join();
      EXPECT_EQ(executor_.violation(), absl::OkStatus());
    }
    return status_;
  }

 private:
  SteadyClock clock_;
  step::EngineStats stats_;
  testing::FakeExecutor executor_{{.limits = kLimits}};
  std::unique_ptr<Engine> engine_;
  absl::Status status_;
  std::thread thread_;
};

// Submits until `count` were taken; cancels some. Returns how many ended otherwise than they may.
int Client(Engine& engine, uint64_t seed, int count) {
  std::mt19937_64 random(seed);
  int wrong = 0;
  std::vector<std::shared_ptr<CheckingSink>> sinks;
  while (static_cast<int>(sinks.size()) < count) {
    const Request request = RandomRequest(random);
    auto sink = SinkFor(request);
    const absl::StatusOr<RequestId> id = engine.Submit(request, sink);
    if (!id.ok()) {
      if (!absl::IsResourceExhausted(id.status())) ++wrong;
      if (!sinks.empty()) sinks.back()->WaitForEnd();
      continue;
    }
    sinks.push_back(sink);
    const uint64_t dice = random() % 4;
    if (dice == 0) engine.Cancel(*id);
    if (dice == 1) sink->WaitForEnd();
    if (dice == 1) engine.Cancel(*id);
  }
  for (const auto& sink : sinks) {
    sink->WaitForEnd();
    if (!sink->broken().empty()) ++wrong;
    if (sink->code() != absl::StatusCode::kOk && sink->code() != absl::StatusCode::kCancelled) {
      ++wrong;
    }
  }
  return wrong;
}

TEST(EngineThreadTest, ManyThreadsGetTheirOwnTokens) {
  RunningEngine engine;
  std::atomic<int> wrong = 0;
  std::vector<std::thread> clients;
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    clients.emplace_back([&, seed] { wrong += Client(*engine, seed, 100); });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(engine.Stop(), absl::OkStatus());
  const Load load = engine->GetLoad();
  EXPECT_EQ(load.running + load.waiting + load.kv_blocks_used, 0);
  step::EngineStats& stats = engine.stats();
  EXPECT_EQ(stats.requests_finished_stop.Get() + stats.requests_finished_length.Get() +
                stats.requests_cancelled.Get(),
            400u);
}

TEST(EngineThreadTest, WakesFromIdleForASubmitAndForStop) {
  RunningEngine engine;
  std::mt19937_64 random(5);
  for (int i = 0; i < 50; ++i) {
    const Request request = RandomRequest(random);
    auto sink = SinkFor(request);
    ASSERT_TRUE(engine->Submit(request, sink).ok());
    sink->WaitForEnd();  // it is idle, or about to be
    EXPECT_EQ(sink->code(), absl::StatusCode::kOk);
  }
  EXPECT_EQ(engine.Stop(), absl::OkStatus());
}

TEST(EngineThreadTest, StopEndsEveryRequestUnavailable) {
  RunningEngine engine;
  std::mt19937_64 random(6);
  std::vector<std::shared_ptr<CheckingSink>> sinks;
  std::thread client([&] {
    for (int i = 0; i < 200; ++i) {
      const Request request = RandomRequest(random);
      auto sink = SinkFor(request);
      if (engine->Submit(request, sink).ok()) sinks.push_back(sink);
    }
  });
  EXPECT_EQ(engine.Stop(), absl::OkStatus());
  client.join();
  for (const auto& sink : sinks) {
    sink->WaitForEnd();
    EXPECT_EQ(sink->broken(), "");
    EXPECT_TRUE(sink->code() == absl::StatusCode::kOk ||
                sink->code() == absl::StatusCode::kUnavailable);
  }
}

TEST(EngineThreadTest, FollowersReplayTheLeadersPlansThroughTheRing) {
  const absl::StatusOr<int> fd =
      step::CreatePlanRing({.readers = 2, .ring_bytes = 16384, .record_bytes_max = 4096});
  ASSERT_TRUE(fd.ok());
  const SteadyClock clock;
  auto writer =
      step::PlanRingWriter::Attach(*fd, std::chrono::seconds(60), {.clock = &clock}).value();
  uint64_t fed[2] = {0, 0};
  std::vector<std::thread> followers;
  for (int32_t i = 0; i < 2; ++i) {
    followers.emplace_back([&, i] {
      auto reader = step::PlanRingReader::Attach(*fd, i, {.clock = &clock}).value();
      testing::FakeExecutor executor({.limits = kLimits});
      step::StepPlan plan;
      step::MaskBatch masks;
      step::StepResult result;
      while (reader->Receive(Deadline::max(), &plan, &masks).value() == step::PlanMessage::kStep) {
        ASSERT_EQ(executor.Launch(plan), absl::OkStatus());
        ASSERT_EQ(executor.Wait(Deadline::max(), &result), absl::OkStatus());
      }
      fed[i] = executor.tokens_fed();
    });
  }
  {
    RunningEngine engine(writer.get());
    EXPECT_EQ(Client(*engine, 3, 60), 0);
    EXPECT_EQ(engine.Stop(), absl::OkStatus());
  }
  for (std::thread& follower : followers) follower.join();
  close(*fd);
  EXPECT_GT(fed[0], 0u);
  EXPECT_EQ(fed[0], fed[1]);
}

}  // namespace
}  // namespace nibble::engine
