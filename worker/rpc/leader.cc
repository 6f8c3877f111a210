#include "worker/rpc/leader.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <future>
#include <utility>

#include "base/check.h"
#include "base/status.h"

namespace nibble::rpc {
namespace {

constexpr int32_t kWarmUpPromptTokens = 16;
constexpr int32_t kWarmUpTokens = 2;

// Keeps how a request ended.
class WarmUpSink final : public engine::Sink {
 public:
  void OnAdmitted(int32_t /*cached_prompt_tokens*/) override {}
  void OnTokens(std::span<const engine::OutputToken> /*tokens*/) override {}
  void OnFinished(const engine::Finish& finish) override { finished_.set_value(finish.status); }
  [[nodiscard]] absl::Status Await() { return finished_.get_future().get(); }

 private:
  std::promise<absl::Status> finished_;
};

void Clear(Counter* counter) { counter->value.store(0, std::memory_order_relaxed); }

template <size_t kBuckets>
void Clear(Histogram<kBuckets>* histogram) {
  for (auto& bucket : histogram->buckets) bucket.store(0, std::memory_order_relaxed);
  histogram->count.store(0, std::memory_order_relaxed);
  histogram->sum.store(0, std::memory_order_relaxed);
}

// The warm-up is nobody's request. REQUIRES: the engine is idle.
void ClearCounts(step::EngineStats* stats) {
  for (Counter* counter :
       {&stats->prompt_tokens, &stats->generated_tokens, &stats->preemptions,
        &stats->nonfinite_rows, &stats->requests_finished_stop, &stats->requests_finished_length,
        &stats->requests_cancelled, &stats->requests_expired, &stats->requests_failed}) {
    Clear(counter);
  }
  for (Counter& steps : stats->steps) Clear(&steps);
  for (auto& seconds : stats->step_seconds) Clear(&seconds);
  Clear(&stats->step_tokens);
  Clear(&stats->time_to_first_token);
  Clear(&stats->queue_seconds);
  Clear(&stats->inter_token);
  Clear(&stats->request_seconds);
}

}  // namespace

Leader::Leader(const Clock* clock) : clock_(clock), ended_fd_(::eventfd(0, EFD_CLOEXEC)) {
  CHECK(ended_fd_ >= 0);
}

absl::StatusOr<std::unique_ptr<Leader>> Leader::Start(LeaderOptions options) {
  // Before any work: a taken port is the likeliest mistake.
  RETURN_IF_ERROR(CheckAvailable(options.server.listen));
  std::unique_ptr<Leader> leader(new Leader(options.clock));
  leader->engine_ = engine::Engine::Create(options.engine, options.executor, options.publisher,
                                           options.clock, options.stats);
  leader->StartEngineThread();
  if (options.warm_up) {
    RETURN_IF_ERROR(leader->WarmUp(options.executor->limits(), options.stats));
  }
  options.server.service.engine = leader->engine_.get();
  options.server.service.clock = options.clock;
  options.server.service.stats = options.stats;
  ASSIGN_OR_RETURN(leader->server_, WorkerServer::Start(std::move(options.server)));
  return leader;
}

void Leader::StartEngineThread() {
  engine_thread_ = std::thread([this] {
    engine_status_ = engine_->Run();
    ended_.store(true, std::memory_order_release);
    const uint64_t one = 1;
    CHECK(::write(ended_fd_, &one, sizeof(one)) == sizeof(one));
  });
}

absl::Status Leader::WarmUp(const step::ExecutorLimits& limits, step::EngineStats* stats) {
  const auto sink = std::make_shared<WarmUpSink>();
  engine::Request request;
  const int32_t room = std::min(limits.max_context, limits.kv_blocks * step::kBlockTokens);
  request.prompt.assign(
      static_cast<size_t>(std::clamp(room - kWarmUpTokens, 1, kWarmUpPromptTokens)), 0);
  request.sampling.temperature = 0;
  request.max_tokens = kWarmUpTokens;
  RETURN_IF_ERROR(engine_->Submit(std::move(request), sink).status());
  RETURN_IF_ERROR(sink->Await());
  // The sequence has ended; the step that was launched ahead of its end retires by itself.
  while (stats->steps_in_flight.Get() != 0 || stats->slots_used.Get() != 0) {
    if (ended()) return absl::InternalError("the engine ended during the warm-up");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  ClearCounts(stats);
  return absl::OkStatus();
}

bool Leader::idle() const {
  const engine::Load load = engine_->GetLoad();
  return load.running + load.waiting == 0 && server_->service().open_streams() == 0;
}

absl::Status Leader::Stop(Duration grace) {
  if (engine_thread_.joinable()) {
    engine_->Stop();
    engine_thread_.join();
    if (server_ != nullptr) server_->Shutdown(clock_->Now() + grace);
  }
  return engine_status_;
}

Leader::~Leader() {
  (void)Stop(Duration::zero());
  server_.reset();  // its streams refer to the engine
  ::close(ended_fd_);
}

}  // namespace nibble::rpc
