#include "tests/sim/world.h"

#include <algorithm>
#include <map>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/support/checking_sink.h"
#include "tests/support/fake_executor.h"
#include "worker/engine/loop_engine.h"
#include "worker/step/crc32c.h"
#include "worker/step/plan_codec.h"

namespace nibble::sim {
namespace {

constexpr uint64_t kTurnsMax = 200'000;
constexpr int32_t kPreemptionsMax = 8;

// The order of everything that can be seen from outside, as a checksum.
class Trace {
 public:
  void Add(std::span<const std::byte> bytes) { crc_ = step::Crc32c(bytes, crc_); }
  void Add(uint64_t value) { Add(std::as_bytes(std::span(&value, 1))); }
  [[nodiscard]] uint32_t crc() const { return crc_; }

 private:
  uint32_t crc_ = 0;
};

// Writes down every plan that the fake executor gets.
class TracingExecutor final : public step::Executor {
 public:
  TracingExecutor(testing::FakeExecutor* executor, Trace* trace)
      : executor_(executor), trace_(trace) {}
  absl::Status Launch(const step::StepPlan& plan) override {
    bytes_.resize(step::EncodedSize(plan));
    const absl::StatusOr<size_t> size = step::Encode(plan, bytes_);
    if (!size.ok()) return size.status();
    trace_->Add(bytes_);
    // A plan must survive the way to the other ranks.
    const absl::Status decoded = step::Decode(bytes_, &copy_);
    if (!decoded.ok()) return decoded;
    return executor_->Launch(copy_);
  }
  absl::Status ProvideMasks(const step::MaskBatch& masks) override {
    return executor_->ProvideMasks(masks);
  }
  absl::Status Wait(Deadline deadline, step::StepResult* result) override {
    return executor_->Wait(deadline, result);
  }
  const step::ExecutorLimits& limits() const override { return executor_->limits(); }

 private:
  testing::FakeExecutor* executor_;
  Trace* trace_;
  std::vector<std::byte> bytes_;
  step::StepPlan copy_;
};

class World {
 public:
  explicit World(const Scenario& scenario)
      : scenario_(scenario),
        fake_(ExecutorOptions(), Faults()),
        executor_(&fake_, &trace_),
        engine_(std::make_unique<engine::LoopEngine>(scenario.engine, &executor_, nullptr, &clock_,
                                                     &stats_)) {}

  Outcome Run() {
    while (outcome_.failure.empty() && Turn()) {
    }
    if (outcome_.failure.empty()) CheckEnd();
    outcome_.trace = trace_.crc();
    outcome_.steps = engine_->GetLoad().steps;
    outcome_.tokens = stats_.generated_tokens.Get();
    outcome_.preemptions = stats_.preemptions.Get();
    outcome_.tokens_given_up = engine_->scheduler().tokens_given_up();
    return outcome_;
  }

 private:
  struct Client {
    const ClientRequest* plan = nullptr;
    engine::RequestId id = 0;
    std::shared_ptr<testing::CheckingSink> sink;
    Deadline deadline = Deadline::max();
    Deadline queue_deadline = Deadline::max();
  };

  testing::FakeExecutorOptions ExecutorOptions() {
    return {.limits = scenario_.limits,
            .step_base = scenario_.step_base,
            .step_per_token = scenario_.step_per_token,
            .clock = &clock_,
            .sleep_until = [this](Deadline time) { AdvanceTo(time); }};
  }
  testing::FakeFaults Faults() const {
    testing::FakeFaults faults = {.launch_error_at = scenario_.launch_error_at,
                                  .wait_error_at = scenario_.wait_error_at,
                                  .hang_at = scenario_.hang_at};
    if (scenario_.non_finite_one_in > 0) {
      faults.non_finite = [this](uint64_t step_id, int32_t slot) {
        return testing::FakeToken(scenario_.seed + step_id, slot, scenario_.non_finite_one_in) == 0;
      };
    }
    return faults;
  }

  void AdvanceTo(Deadline time) {
    if (time > clock_.Now()) clock_.Advance(time - clock_.Now());
  }
  void Fail(const std::string& what) {
    if (outcome_.failure.empty()) outcome_.failure = what;
  }
  Duration LongestStep() const {
    return scenario_.step_base + scenario_.step_per_token * scenario_.limits.max_step_tokens;
  }

  // One turn of the engine's loop after all that is due. False at the end of the scenario.
  bool Turn() {
    RunDueEvents();
    const absl::StatusOr<bool> worked = engine_->RunStep();
    if (++outcome_.turns > kTurnsMax) Fail("does not come to an end");
    if (!worked.ok()) {
      outcome_.group_ended = true;
      if (scenario_.launch_error_at + scenario_.wait_error_at + scenario_.hang_at == 0) {
        Fail(absl::StrCat("the engine failed: ", worked.status().ToString()));
      }
      return false;
    }
    CheckTurn();
    if (*worked) return true;
    const Deadline next = NextEvent();
    if (next == Deadline::max()) return false;
    AdvanceTo(next);
    return true;
  }

  Deadline NextEvent() const {
    Deadline next = drained_ ? Deadline::max() : scenario_.drain_at;
    if (next_client_ < scenario_.clients.size()) {
      next = std::min(next, scenario_.clients[next_client_].arrival);
    }
    if (!cancels_.empty()) next = std::min(next, cancels_.begin()->first);
    return next;
  }

  void RunDueEvents() {
    const Deadline now = clock_.Now();
    if (!drained_ && scenario_.drain_at <= now) {
      engine_->Drain();
      drained_ = true;
    }
    while (next_client_ < scenario_.clients.size() &&
           scenario_.clients[next_client_].arrival <= now) {
      Submit(scenario_.clients[next_client_++]);
    }
    while (!cancels_.empty() && cancels_.begin()->first <= now) {
      engine_->Cancel(cancels_.begin()->second);
      cancels_.erase(cancels_.begin());
    }
  }

  void Submit(const ClientRequest& plan) {
    const Deadline now = clock_.Now();
    engine::Request request = plan.request;
    if (plan.deadline_after > Duration(0)) request.deadline = now + plan.deadline_after;
    if (plan.queue_deadline_after > Duration(0)) {
      request.queue_deadline = now + plan.queue_deadline_after;
    }
    const size_t index = clients_.size();
    Client client = {.plan = &plan,
                     .sink = MakeSink(plan, request, index),
                     .deadline = request.deadline,
                     .queue_deadline = request.queue_deadline};
    const absl::StatusOr<engine::RequestId> id = engine_->Submit(request, client.sink);
    if (!id.ok()) {
      CheckRefusal(plan.request, id.status());
      return;
    }
    if (drained_) Fail("took a request while it drained");
    client.id = *id;
    ++outcome_.accepted;
    if (plan.cancel == CancelWhen::kRightAway) engine_->Cancel(*id);
    if (plan.cancel == CancelWhen::kAfterDelay) cancels_.emplace(now + plan.cancel_after, *id);
    clients_.push_back(std::move(client));
  }

  std::shared_ptr<testing::CheckingSink> MakeSink(const ClientRequest& plan,
                                                  const engine::Request& request, size_t index) {
    const int32_t left =
        scheduling::ContextTokens(scenario_.limits) - static_cast<int32_t>(request.prompt.size());
    auto sink = std::make_shared<testing::CheckingSink>(request, scenario_.limits.vocab_size,
                                                        std::min(request.max_tokens, left));
    sink->on_admitted = [this, &plan, index] {
      Seen(index, 1);
      if (static_cast<int64_t>(index) <= last_admitted_) Fail("admitted one out of turn");
      last_admitted_ = static_cast<int64_t>(index);
      if (plan.cancel == CancelWhen::kOnAdmitted) engine_->Cancel(clients_[index].id);
    };
    sink->on_tokens = [this, &plan, index](size_t tokens) {
      Seen(index, 2 + static_cast<uint64_t>(clients_[index].sink->tokens().back()));
      const bool now = plan.cancel == CancelWhen::kOnToken && tokens == plan.cancel_token;
      if (now) engine_->Cancel(clients_[index].id);
    };
    sink->on_finished = [this, &plan, index] {
      Seen(index, 0);
      CheckFinish(clients_[index]);
      if (plan.cancel == CancelWhen::kOnFinished) engine_->Cancel(clients_[index].id);
    };
    return sink;
  }

  void Seen(size_t index, uint64_t what) {
    trace_.Add(index);
    trace_.Add(what);
    trace_.Add(static_cast<uint64_t>(clock_.Now().time_since_epoch().count()));
  }

  void CheckRefusal(const engine::Request& request, const absl::Status& status) {
    const auto context = static_cast<size_t>(scheduling::ContextTokens(scenario_.limits));
    const bool invalid = request.prompt.empty() || request.prompt.size() >= context;
    if (invalid != absl::IsInvalidArgument(status)) {
      Fail(absl::StrCat("refused wrongly: ", status.ToString()));
    } else if (!invalid && drained_ != absl::IsUnavailable(status)) {
      Fail(absl::StrCat("refused wrongly: ", status.ToString()));
    }
    ++refused_;
  }

  void CheckFinish(const Client& client) {
    const engine::Finish& finish = client.sink->finish();
    const Deadline now = clock_.Now();
    trace_.Add(static_cast<uint64_t>(finish.status.raw_code()));
    trace_.Add(static_cast<uint64_t>(finish.completion_tokens));
    if (finish.status.ok()) ++outcome_.finished;
    outcome_.cached_tokens += static_cast<uint64_t>(finish.cached_prompt_tokens);
    const bool may = scenario_.engine.prefix_cache && !client.plan->request.bypass_prefix_cache;
    if (!may && finish.cached_prompt_tokens > 0) Fail("took a prefix that it did not want");
    if (finish.preemptions > kPreemptionsMax) Fail("preempted one too often");
    // A hang takes the whole step deadline, and a cancel may arrive meanwhile.
    const bool on_time = scenario_.hang_at != 0 || client.deadline == Deadline::max() ||
                         now <= client.deadline + 2 * LongestStep();
    if (!on_time) {
      Fail("kept one long after its deadline");
    }
    if (absl::IsDeadlineExceeded(finish.status) && now < client.deadline) {
      Fail("expired one before its deadline");
    }
    if (absl::IsResourceExhausted(finish.status) &&
        (now < client.queue_deadline || client.sink->admitted())) {
      Fail("timed one out that had no reason to wait");
    }
    if (absl::IsCancelled(finish.status) && client.plan->cancel == CancelWhen::kNever) {
      Fail("cancelled one that nobody cancelled");
    }
  }

  void CheckTurn() {
    const absl::Status scheduler = engine_->scheduler().CheckInvariants();
    if (!scheduler.ok()) Fail(scheduler.ToString());
    if (!fake_.violation().ok()) Fail(fake_.violation().ToString());
    const int64_t blocks = stats_.kv_blocks_free.Get() + stats_.kv_blocks_cached.Get() +
                           stats_.kv_blocks_used.Get() + stats_.kv_blocks_quarantined.Get();
    if (blocks != scenario_.limits.kv_blocks) Fail("blocks do not add up");
    if (stats_.requests_waiting.Get() > scenario_.engine.queue_size) Fail("queue over its limit");
    if (stats_.requests_running.Get() > scenario_.limits.max_slots) Fail("slots over their limit");
    if (stats_.steps_in_flight.Get() > 1) Fail("a turn left two steps in flight");
  }

  void CheckEnd() {
    uint64_t tokens = 0;
    for (const Client& client : clients_) {
      if (!client.sink->broken().empty()) {
        Fail(absl::StrCat("a client ", client.sink->broken()));
      }
      if (!client.sink->ended()) {
        Fail("a client never heard how its request ended");
        continue;
      }
      const absl::Status& status = client.sink->finish().status;
      if (absl::IsUnavailable(status) && !outcome_.group_ended) Fail("lost one without a fault");
      if (absl::IsInternal(status) && scenario_.non_finite_one_in == 0) Fail("broke one");
      const bool known = status.ok() || absl::IsUnavailable(status) || absl::IsInternal(status) ||
                         absl::IsCancelled(status) || absl::IsDeadlineExceeded(status) ||
                         absl::IsResourceExhausted(status);
      if (!known) Fail(absl::StrCat("ended one with ", status.ToString()));
      tokens += client.sink->tokens().size();
    }
    if (!fake_.violation().ok()) Fail(fake_.violation().ToString());
    if (stats_.requests_running.Get() != 0) Fail("requests still run");
    if (stats_.requests_waiting.Get() != 0) Fail("requests still wait");
    if (stats_.waiting_prompt_tokens.Get() != 0) Fail("prompt tokens still wait");
    if (stats_.slots_used.Get() != 0) Fail("slots are still used");
    if (stats_.kv_blocks_used.Get() != 0) Fail("blocks are still used");
    if (!outcome_.group_ended && stats_.kv_blocks_quarantined.Get() != 0) Fail("blocks still rest");
    if (!outcome_.group_ended && stats_.steps_in_flight.Get() != 0) Fail("steps are in flight");
    CheckCounters(tokens);
    CheckRecomputed();
  }

  // Every request and every token is in exactly one counter.
  void CheckCounters(uint64_t tokens) {
    const uint64_t ended = stats_.requests_finished_stop.Get() +
                           stats_.requests_finished_length.Get() + stats_.requests_cancelled.Get() +
                           stats_.requests_expired.Get() + stats_.requests_failed.Get() +
                           stats_.rejected[step::kQueueTimeout].Get();
    if (ended != outcome_.accepted) Fail("counted other ends than there were");
    uint64_t refused = 0;
    for (const step::RejectReason reason :
         {step::kQueueFull, step::kDrainingReject, step::kTooLong, step::kInvalid}) {
      refused += stats_.rejected[reason].Get();
    }
    if (refused != refused_) Fail("counted other refusals than there were");
    if (stats_.generated_tokens.Get() != tokens) Fail("counted other tokens than it delivered");
  }

  // Preemption must stay cheap where there is room, and bounded everywhere.
  void CheckRecomputed() {
    const uint64_t given_up = engine_->scheduler().tokens_given_up();
    uint64_t bound = 0;
    int32_t largest = 0;
    for (const Client& client : clients_) {
      const engine::Request& request = client.plan->request;
      const auto prompt = static_cast<int32_t>(request.prompt.size());
      const int32_t need =
          std::min(prompt + request.max_tokens, scheduling::ContextTokens(scenario_.limits));
      largest = std::max(largest, need);
      bound += static_cast<uint64_t>(need) * kPreemptionsMax;
    }
    if (given_up > bound) Fail("gave up more than its limit allows");
    const uint64_t useful = fake_.tokens_fed() - std::min(fake_.tokens_fed(), given_up);
    const bool room = scenario_.limits.kv_blocks * step::kBlockTokens >= 4 * largest;
    if (room && given_up > 2 * useful) Fail("recomputed more than twice what was useful");
  }

  const Scenario& scenario_;
  Outcome outcome_;
  Trace trace_;
  ManualClock clock_;
  step::EngineStats stats_;
  testing::FakeExecutor fake_;
  TracingExecutor executor_;
  std::unique_ptr<engine::LoopEngine> engine_;
  std::vector<Client> clients_;  // those taken in, by arrival
  std::multimap<Deadline, engine::RequestId> cancels_;
  size_t next_client_ = 0;
  int64_t last_admitted_ = -1;
  uint64_t refused_ = 0;
  bool drained_ = false;
};

}  // namespace

Outcome RunScenario(const Scenario& scenario) { return World(scenario).Run(); }

}  // namespace nibble::sim
