// An engine over the fake executor, driven step by step in virtual time.
#pragma once

#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "tests/support/checking_sink.h"
#include "tests/support/fake_executor.h"
#include "worker/engine/loop_engine.h"
#include "worker/scheduling/scheduler.h"

namespace nibble::engine {

using testing::CheckingSink;

struct BenchOptions {
  EngineOptions engine;
  step::ExecutorLimits limits = {.vocab_size = 1000,
                                 .max_context = 256,
                                 .max_slots = 4,
                                 .max_step_tokens = 64,
                                 .kv_blocks = 32};
  testing::FakeFaults faults;
  Duration step_base{};
  Duration step_per_token{};
  step::PlanPublisher* publisher = nullptr;
};

inline Request MakeRequest(uint64_t seed, int32_t prompt, int32_t max_tokens) {
  Request request;
  request.seed = seed;
  for (int32_t i = 0; i < prompt; ++i) request.prompt.push_back(i % 50);
  request.max_tokens = max_tokens;
  return request;
}

class EngineBench {
 public:
  explicit EngineBench(BenchOptions options = {})
      : executor_({.limits = options.limits,
                   .step_base = options.step_base,
                   .step_per_token = options.step_per_token,
                   .clock = &clock_,
                   .sleep_until = [this](Deadline time) { SleepUntil(time); }},
                  options.faults),
        engine_(std::make_unique<LoopEngine>(options.engine, &executor_, options.publisher, &clock_,
                                             &stats_)) {}
  ~EngineBench() {
    engine_.reset();
    for (const auto& sink : sinks_) EXPECT_EQ(sink->broken(), "");
    EXPECT_EQ(executor_.violation(), absl::OkStatus());
  }

  LoopEngine& engine() { return *engine_; }
  testing::FakeExecutor& executor() { return executor_; }
  step::EngineStats& stats() { return stats_; }
  ManualClock& clock() { return clock_; }
  void DestroyEngine() { engine_.reset(); }

  std::shared_ptr<CheckingSink> MakeSink(const Request& request) {
    const int32_t left =
        scheduling::ContextTokens(executor_.limits()) - static_cast<int32_t>(request.prompt.size());
    auto sink = std::make_shared<CheckingSink>(request, executor_.limits().vocab_size,
                                               std::min(request.max_tokens, left));
    sinks_.push_back(sink);
    return sink;
  }

  struct Submitted {
    RequestId id = 0;
    std::shared_ptr<CheckingSink> sink;
  };
  Submitted Submit(const Request& request) {
    auto sink = MakeSink(request);
    const absl::StatusOr<RequestId> id = engine_->Submit(request, sink);
    EXPECT_TRUE(id.ok()) << id.status();
    return {.id = id.value_or(0), .sink = sink};
  }
  absl::Status TrySubmit(const Request& request) {
    return engine_->Submit(request, MakeSink(request)).status();
  }

  void Turns(int count) {
    for (int i = 0; i < count; ++i) ASSERT_TRUE(engine_->RunStep().ok());
  }

  // Until there is nothing left to do; then every counter must be zero.
  void RunToEnd() {
    absl::StatusOr<bool> worked = true;
    for (int turns = 0; worked.ok() && *worked && turns < 100000; ++turns) {
      worked = engine_->RunStep();
    }
    ASSERT_TRUE(worked.ok()) << worked.status();
    ExpectIdle();
  }

  void ExpectIdle() {
    const Load load = engine_->GetLoad();
    EXPECT_EQ(load.running, 0);
    EXPECT_EQ(load.waiting, 0);
    EXPECT_EQ(load.waiting_prompt_tokens, 0);
    EXPECT_EQ(load.kv_blocks_used, 0);
    EXPECT_EQ(stats_.kv_blocks_quarantined.Get(), 0);
    EXPECT_EQ(stats_.kv_blocks_free.Get() + stats_.kv_blocks_cached.Get(),
              stats_.kv_blocks_total.Get());
    EXPECT_EQ(stats_.slots_used.Get(), 0);
    EXPECT_EQ(stats_.steps_in_flight.Get(), 0);
  }

 private:
  void SleepUntil(Deadline time) {
    if (time > clock_.Now()) clock_.Advance(time - clock_.Now());
  }

  ManualClock clock_;
  step::EngineStats stats_;
  testing::FakeExecutor executor_;
  std::vector<std::shared_ptr<CheckingSink>> sinks_;
  std::unique_ptr<LoopEngine> engine_;
};

}  // namespace nibble::engine
