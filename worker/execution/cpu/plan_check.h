// Checks a plan against the executor's limits before it runs: an index out of range would read or
// write memory of another sequence.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "worker/step/executor.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

// Follows the slots through the plans in launch order. One thread.
class PlanChecker {
 public:
  explicit PlanChecker(const step::ExecutorLimits& limits);

  // INVALID_ARGUMENT says which part of the plan is out of its range. Takes the plan's changes to
  // the slots over; after an error the checker is of no further use.
  [[nodiscard]] absl::Status Check(const step::StepPlan& plan);

 private:
  struct SlotState {
    bool open = false;
    bool has_token = false;   // history or a sampled token
    int32_t blocks = 0;       // entries of the block table that are set, from 0 on
    uint64_t last_check = 0;  // the last Check() that saw a sequence of it
  };

  [[nodiscard]] absl::Status CheckSlots(const step::StepPlan& plan);
  [[nodiscard]] absl::Status CheckSetup(const step::SlotSetup& setup);
  [[nodiscard]] absl::Status CheckBlocks(const step::StepPlan& plan);
  [[nodiscard]] absl::Status CheckSequence(const step::StepPlan& plan,
                                           const step::SequenceStep& sequence);
  [[nodiscard]] absl::Status CheckTokens(const step::StepPlan& plan,
                                         const step::SequenceStep& sequence, bool has_token);
  [[nodiscard]] absl::Status CheckMasks(const step::StepPlan& plan) const;

  const step::ExecutorLimits limits_;
  std::vector<SlotState> slots_;
  uint64_t checks_ = 0;
};

}  // namespace nibble::execution
