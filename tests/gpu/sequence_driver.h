// Steps of sequences on any executor.
#pragma once

#include "base/check.h"
#include "tests/support/plan_builder.h"
#include "worker/step/executor.h"

namespace nibble::gpu_check {

// Errors of the executor are fatal.
class SequenceDriver : public testing::PlanBuilder {
 public:
  explicit SequenceDriver(step::Executor* executor)
      : PlanBuilder(executor->limits().kv_blocks), executor_(executor) {}

  void Launch() {
    const absl::Status status = executor_->Launch(Finished());
    CHECK_MSG(status.ok(), status.ToString());
    StartNext();
  }
  [[nodiscard]] step::StepResult Wait() {
    step::StepResult result;
    const absl::Status status = executor_->Wait(Deadline::max(), &result);
    CHECK_MSG(status.ok(), status.ToString());
    return result;
  }
  [[nodiscard]] step::StepResult Run() {
    Launch();
    return Wait();
  }

 private:
  step::Executor* const executor_;
};

}  // namespace nibble::gpu_check
