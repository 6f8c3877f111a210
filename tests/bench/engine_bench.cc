// Engine steps a second over the fake executor, into an in-process sink: what the leader's own
// path costs. The target is 20 000 at 64 sequences.
#include <benchmark/benchmark.h>

#include <memory>
#include <thread>

#include "base/check.h"
#include "base/clock.h"
#include "tests/support/fake_executor.h"
#include "worker/engine/engine.h"
#include "worker/step/plan_ring.h"

namespace nibble::engine {
namespace {

// Takes tokens, and asks for the next sequence when one has ended.
class Resubmitter final : public Sink, public std::enable_shared_from_this<Resubmitter> {
 public:
  Resubmitter(Engine* engine, uint64_t seed) : engine_(engine), seed_(seed) {}

  void Submit() {
    Request request;
    request.prompt.assign(100, 1);
    request.seed = seed_++;
    request.max_tokens = 400;
    CHECK(engine_->Submit(std::move(request), shared_from_this()).ok());
  }
  void OnAdmitted(int32_t) override {}
  void OnTokens(std::span<const OutputToken> tokens) override { tokens_ += tokens.size(); }
  void OnFinished(const Finish& finish) override {
    if (finish.status.ok()) Submit();
  }
  uint64_t tokens() const { return tokens_; }

 private:
  Engine* engine_;
  uint64_t seed_;
  uint64_t tokens_ = 0;
};

// Takes what comes.
class Listener final : public Sink {
 public:
  void OnAdmitted(int32_t) override {}
  void OnTokens(std::span<const OutputToken>) override {}
  void OnFinished(const Finish&) override {}
};

void RunSteps(benchmark::State& state, step::PlanPublisher* publisher) {
  const SteadyClock clock;
  step::EngineStats stats;
  testing::FakeExecutorOptions options;
  options.limits.max_slots = static_cast<int32_t>(state.range(0));
  options.check_whole_history = false;
  testing::FakeExecutor executor(options);
  const bool prefix_cache = state.range(1) != 0;
  const auto engine = Engine::Create({.queue_size = 1024, .prefix_cache = prefix_cache}, &executor,
                                     publisher, &clock, &stats);
  std::vector<std::shared_ptr<Resubmitter>> sinks;
  for (int64_t i = 0; i < state.range(0); ++i) {
    sinks.push_back(std::make_shared<Resubmitter>(engine.get(), static_cast<uint64_t>(i) << 32));
    sinks.back()->Submit();
  }
  for (int i = 0; i < 100; ++i) CHECK(engine->RunStep().ok());
  for (auto _ : state) CHECK(engine->RunStep().ok());
  uint64_t tokens = 0;
  for (const auto& sink : sinks) tokens += sink->tokens();
  state.counters["steps"] =
      benchmark::Counter(static_cast<double>(state.iterations()), benchmark::Counter::kIsRate);
  state.counters["sequences"] = static_cast<double>(state.range(0));
  state.counters["tokens_per_step"] =
      static_cast<double>(tokens) / static_cast<double>(state.iterations() + 100);
}

void EngineSteps(benchmark::State& state) { RunSteps(state, nullptr); }
BENCHMARK(EngineSteps)
    ->ArgNames({"sequences", "prefix_cache"})
    ->ArgsProduct({{1, 16, 64}, {0, 1}})
    ->UseRealTime();

// Decodes beside a request that waits for room and begins like one before it: its `blocks` cached
// blocks are looked for at every step.
void EngineStepsBesideAWaitingPrefix(benchmark::State& state) {
  constexpr int32_t kBlocks = 4096;
  const auto prefix_tokens = static_cast<size_t>(state.range(0)) * step::kBlockTokens;
  const SteadyClock clock;
  step::EngineStats stats;
  testing::FakeExecutorOptions options;
  options.limits.kv_blocks = kBlocks;
  options.limits.max_context = (kBlocks - 1) * step::kBlockTokens;
  options.check_whole_history = false;
  testing::FakeExecutor executor(options);
  const auto engine = Engine::Create({.queue_size = 16}, &executor, nullptr, &clock, &stats);
  const auto submit = [&](size_t prompt, int32_t first_token, int32_t max_tokens) {
    Request request;
    request.prompt.assign(prompt, 1);
    request.prompt[0] = first_token;
    request.max_tokens = max_tokens;
    CHECK(engine->Submit(std::move(request), std::make_shared<Listener>()).ok());
  };
  const auto run_until = [&](const Gauge& gauge, int64_t value) {
    do {
      CHECK(engine->RunStep().ok());
    } while (gauge.Get() != value);
  };
  submit(prefix_tokens + 1, 1, 1);  // leaves its prefix
  run_until(stats.requests_running, 1);
  run_until(stats.requests_running, 0);
  constexpr int32_t kRunning = 4;
  const int32_t each = (kBlocks - 64 - static_cast<int32_t>(state.range(0))) / kRunning;
  for (int32_t i = 0; i < kRunning; ++i) {
    submit(static_cast<size_t>(each - 200) * step::kBlockTokens, 2 + i, 200 * step::kBlockTokens);
  }
  run_until(stats.requests_running, kRunning);
  submit(prefix_tokens + size_t{kBlocks / 2} * step::kBlockTokens, 1, 1);  // longer than the room
  run_until(stats.requests_waiting, 1);
  for (auto _ : state) {
    CHECK(engine->RunStep().ok());
  }
  CHECK(stats.requests_waiting.Get() == 1);
}
BENCHMARK(EngineStepsBesideAWaitingPrefix)
    ->ArgName("blocks")
    ->Arg(1)
    ->Arg(64)
    ->Arg(512)
    ->Iterations(2000)
    ->UseRealTime();

// EngineSteps with a follower that reads and checks every plan on another thread.
void EngineStepsThroughTheRing(benchmark::State& state) {
  const absl::StatusOr<int> fd = step::CreatePlanRing({});
  CHECK(fd.ok());
  const SteadyClock clock;
  const step::PlanRingWait wait = {.clock = &clock};
  auto writer = step::PlanRingWriter::Attach(*fd, std::chrono::seconds(10), wait).value();
  std::thread follower([&] {
    auto reader = step::PlanRingReader::Attach(*fd, 0, wait).value();
    step::StepPlan plan;
    step::MaskBatch masks;
    absl::StatusOr<step::PlanMessage> message;
    do {
      message = reader->Receive(Deadline::max(), &plan, &masks);
      CHECK(message.ok());
    } while (*message != step::PlanMessage::kStop);
  });
  RunSteps(state, writer.get());
  CHECK(writer->Stop().ok());
  follower.join();
}
BENCHMARK(EngineStepsThroughTheRing)
    ->ArgNames({"sequences", "prefix_cache"})
    ->ArgsProduct({{64}, {0, 1}})
    ->UseRealTime();

}  // namespace
}  // namespace nibble::engine

BENCHMARK_MAIN();
