// The engine as a loop over scheduler and executor.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/engine/engine.h"
#include "worker/engine/inbox.h"
#include "worker/scheduling/scheduler.h"
#include "worker/step/executor.h"
#include "worker/step/group_stats.h"
#include "worker/step/plan_channel.h"

namespace nibble::engine {

// Members belong to the engine thread, except inbox_ and what never changes.
class LoopEngine final : public Engine {
 public:
  LoopEngine(const EngineOptions& options, step::Executor* executor, step::PlanPublisher* publisher,
             const Clock* clock, step::EngineStats* stats);
  ~LoopEngine() override;

  [[nodiscard]] absl::StatusOr<RequestId> Submit(Request request,
                                                 std::shared_ptr<Sink> sink) override;
  void Cancel(RequestId id) override;
  void Drain() override;
  [[nodiscard]] Load GetLoad() const override;
  [[nodiscard]] absl::Status Run() override;
  void Stop() override;
  [[nodiscard]] absl::StatusOr<bool> RunStep() override;

  // Engine thread; for simulations.
  [[nodiscard]] const scheduling::Scheduler& scheduler() const { return scheduler_; }

 private:
  // A request that has not ended; the place in its id is its index.
  struct Active {
    RequestId id = 0;  // 0: nobody
    std::shared_ptr<Sink> sink;
    int32_t prompt_tokens = 0;
    int32_t cached_tokens = 0;  // of the prompt
    int32_t output_tokens = 0;
    Deadline submitted{};
    Deadline admitted{};
    Deadline first_token{};
    Deadline last_token{};
  };
  struct Launched {
    scheduling::PlannedStep step;
    Deadline at{};
  };

  [[nodiscard]] absl::Status CheckRequest(const Request& request) const;
  [[nodiscard]] absl::StatusOr<bool> Turn();
  bool DrainInbox();
  void Accept(Submission submission);
  [[nodiscard]] absl::Status Launch(const scheduling::PlannedStep& step);
  [[nodiscard]] absl::Status Retire();
  void CountStep(const Launched& launched);
  void FitChunkToRate(int32_t tokens, Duration lasted);
  void Deliver();
  void DeliverAdmitted(const scheduling::Event& event, Active* active);
  void DeliverToken(const scheduling::Event& event, Active* active);
  void DeliverEnd(const scheduling::Event& event, Active* active);
  [[nodiscard]] Finish MakeFinish(const scheduling::Event& event, const Active& active) const;
  void CountEnd(const scheduling::Event& event, const Active& active);
  void UpdateGauges();
  // Ends every request UNAVAILABLE; none enters after this.
  void EndEverything(const std::string& reason);
  [[nodiscard]] absl::Status Fail(absl::Status status);

  step::Executor* const executor_;
  step::PlanPublisher* const publisher_;  // nullptr: one rank
  const Clock* const clock_;
  step::EngineStats* const stats_;
  const EngineOptions options_;
  Inbox inbox_;

  scheduling::Scheduler scheduler_;
  std::vector<Active> active_;
  Deadline now_{};  // of this turn
  step::StepPlan plan_;
  step::StepResult result_;
  Launched launched_[2];  // by step id, modulo 2
  uint64_t retired_step_ = 0;
  Deadline last_retired_{};
  double tokens_per_second_ = 0;  // of steps with prompts, smoothed; 0: not measured yet
  absl::Status failed_;
  std::string end_reason_;

  // Reused from turn to turn.
  std::vector<Submission> submissions_;
  std::vector<RequestId> cancels_;
  std::vector<RequestId> ended_;
  std::vector<RequestId> left_queue_;
};

}  // namespace nibble::engine
