// Plans from the leader to the other ranks: a shared-memory ring inside one
// machine (worker/group), a gRPC stream across machines.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/step/step_plan.h"

namespace nibble::step {

enum class PlanMessage { kStep, kMasks, kStop };

// The leader's end. One thread.
class PlanPublisher {
 public:
  virtual ~PlanPublisher() = default;
  // DEADLINE_EXCEEDED when a reader leaves the channel full until the step
  // deadline: the group ends.
  [[nodiscard]] virtual absl::Status Publish(const StepPlan& plan) = 0;
  [[nodiscard]] virtual absl::Status Publish(const MaskBatch& masks) = 0;
  [[nodiscard]] virtual absl::Status Stop() = 0;
};

// A follower's end. One thread.
class PlanReceiver {
 public:
  virtual ~PlanReceiver() = default;
  // Waits for the next message and fills *plan or *masks according to its kind.
  // DATA_LOSS on a record that does not check out.
  [[nodiscard]] virtual absl::StatusOr<PlanMessage> Receive(Deadline deadline, StepPlan* plan,
                                                            MaskBatch* masks) = 0;
};

}  // namespace nibble::step
