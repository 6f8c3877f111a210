// A scheduler and the fake executor, driven one step ahead as the engine does, with what came out
// of each sequence written down.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/support/fake_executor.h"
#include "worker/scheduling/scheduler.h"

namespace nibble::scheduling {

struct Outcome {
  bool admitted = false;
  bool ended = false;
  EndReason reason = EndReason::kStop;
  int32_t output_count = 0;
  int32_t preemptions = 0;
  int32_t queried_tokens = 0;
  int32_t cached_tokens = 0;
  std::vector<int32_t> tokens;
};

class SchedulerBench {
 public:
  explicit SchedulerBench(SchedulerOptions options, testing::FakeFaults faults = {})
      : options_(std::move(options)),
        executor_({.limits = options_.limits}, std::move(faults)),
        scheduler_(options_) {}

  Scheduler& scheduler() { return scheduler_; }
  testing::FakeExecutor& executor() { return executor_; }
  const step::StepPlan& plan() const { return plan_; }
  Outcome& operator[](uint64_t id) { return outcomes_[id]; }

  // Plans the next step and launches it. False when there is none.
  bool Launch() {
    planned_ = scheduler_.Schedule(&plan_);
    TakeEvents();
    if (planned_.has_value()) {
      EXPECT_EQ(executor_.Launch(plan_), absl::OkStatus());
    }
    Check();
    return planned_.has_value();
  }
  const std::optional<PlannedStep>& planned() const { return planned_; }

  // Waits for the oldest step and takes its result in.
  void Retire() {
    ASSERT_EQ(executor_.Wait(Deadline::max(), &result_), absl::OkStatus());
    ASSERT_EQ(scheduler_.Commit(result_), absl::OkStatus());
    TakeEvents();
    Check();
  }

  // One turn of the engine's loop. False when there was nothing to do.
  bool Turn() {
    const bool launched = Launch();
    if (scheduler_.in_flight() == 2 || (!launched && scheduler_.in_flight() > 0)) {
      Retire();
      return true;
    }
    return launched;
  }

  // Turns until there is nothing left to do; then everything must be at rest.
  void RunToEnd(int turns_max = 100000) {
    while (turns_max-- > 0 && Turn()) {
    }
    EXPECT_EQ(scheduler_.running(), 0);
    EXPECT_EQ(scheduler_.waiting(), 0);
    EXPECT_EQ(scheduler_.in_flight(), 0);
    EXPECT_EQ(scheduler_.blocks().used(), 0);
    EXPECT_EQ(scheduler_.blocks().quarantined(), 0);
  }

  void TakeEvents() {
    for (const Event& event : scheduler_.events()) {
      Outcome& outcome = outcomes_[event.id];
      EXPECT_FALSE(outcome.ended) << "an event of " << event.id << " after its end";
      switch (event.kind) {
        case EventKind::kAdmitted:
          EXPECT_FALSE(outcome.admitted);
          outcome.admitted = true;
          outcome.queried_tokens = event.queried_tokens;
          outcome.cached_tokens = event.cached_tokens;
          break;
        case EventKind::kPreempted:
          ++outcome.preemptions;
          break;
        case EventKind::kToken:
          EXPECT_TRUE(outcome.admitted);
          outcome.tokens.push_back(event.token_id);
          break;
        case EventKind::kEnded:
          outcome.ended = true;
          outcome.reason = event.reason;
          outcome.output_count = event.output_count;
          EXPECT_EQ(event.preemptions, outcome.preemptions);
          EXPECT_EQ(event.was_admitted, outcome.admitted);
          EXPECT_EQ(static_cast<size_t>(event.output_count), outcome.tokens.size());
          break;
      }
    }
    scheduler_.ClearEvents();
  }

 private:
  void Check() {
    ASSERT_EQ(scheduler_.CheckInvariants(), absl::OkStatus());
    ASSERT_EQ(executor_.violation(), absl::OkStatus());
  }

  SchedulerOptions options_;
  testing::FakeExecutor executor_;
  Scheduler scheduler_;
  step::StepPlan plan_;
  step::StepResult result_;
  std::optional<PlannedStep> planned_;
  std::map<uint64_t, Outcome> outcomes_;
};

inline SequenceSpec Spec(uint64_t id, int32_t prompt, int32_t max_tokens) {
  SequenceSpec spec;
  spec.id = id;
  spec.seed = id * 1000;
  for (int32_t i = 0; i < prompt; ++i) spec.prompt.push_back(i % 50);
  spec.max_tokens = max_tokens;
  return spec;
}

// The tokens that a spec must come to, were it never to stop.
inline std::vector<int32_t> ExpectedTokens(const SequenceSpec& spec, int32_t count, int32_t vocab) {
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < count; ++i) {
    tokens.push_back(testing::FakeToken(spec.seed, i, vocab, spec.stop_ids, spec.min_tokens));
  }
  return tokens;
}

}  // namespace nibble::scheduling
