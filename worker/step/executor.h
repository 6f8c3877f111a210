// What runs steps: one implementation for CPUs, one for GPUs, one fake for tests.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "base/clock.h"
#include "worker/step/step_plan.h"

namespace nibble::step {

// What the scheduler must know of an executor. Agreed by all ranks of a group
// in their handshake: kv_blocks is the smallest rank's.
struct ExecutorLimits {
  int32_t vocab_size = 0;
  int32_t max_context = 0;      // positions of one sequence
  int32_t max_slots = 0;        // sequences open at once
  int32_t max_step_tokens = 0;  // input tokens of one step, all sequences together
  int32_t kv_blocks = 0;        // blocks of kBlockTokens positions
};

// Steps run in launch order. Two steps may be launched and not yet waited for:
// launch t+1, then wait for t. One thread calls Launch, ProvideMasks and Wait.
// An error is a fault of the group (device, collective, deadline): the group ends.
class Executor {
 public:
  virtual ~Executor() = default;

  // Starts a step and returns without waiting for it. The plan may be reused
  // by the caller as soon as this returns.
  [[nodiscard]] virtual absl::Status Launch(const StepPlan& plan) = 0;

  // Hands in the masks of a launched step that has kLate rows.
  [[nodiscard]] virtual absl::Status ProvideMasks(const MaskBatch& masks) = 0;

  // Waits for the oldest launched step and fills *result (cleared first).
  // DEADLINE_EXCEEDED when the step is not done by then.
  [[nodiscard]] virtual absl::Status Wait(Deadline deadline, StepResult* result) = 0;

  [[nodiscard]] virtual const ExecutorLimits& limits() const = 0;
};

}  // namespace nibble::step
