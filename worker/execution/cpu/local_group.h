// A whole tensor-parallel group in one process: every rank an executor with threads of its own,
// joined through shared memory. For benchmarks, calibration and tests; a server's ranks are
// processes.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/collectives/communicator.h"
#include "worker/collectives/shm_communicator.h"
#include "worker/execution/cpu/cpu_executor.h"
#include "worker/step/executor.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/memory_plan.h"

namespace nibble::execution {

// As an Executor it runs each step on all ranks and checks that they agree.
class LocalGroup final : public step::Executor {
 public:
  struct Options {
    int32_t ranks = 1;
    weights::MemoryOptions memory = {};
    int32_t threads = 1;  // compute threads of each rank; memory.threads follows
    cpu::IsaLevel isa = cpu::BestIsaLevel();
  };
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<LocalGroup>> Create(
      const weights::Checkpoint& checkpoint, const Options& options);
  ~LocalGroup() override;

  [[nodiscard]] absl::Status Launch(const step::StepPlan& plan) override;
  [[nodiscard]] absl::Status ProvideMasks(const step::MaskBatch& masks) override;
  // Rank 0's result; INTERNAL when another rank's tokens differ.
  [[nodiscard]] absl::Status Wait(Deadline deadline, step::StepResult* result) override;
  [[nodiscard]] const step::ExecutorLimits& limits() const override;

  [[nodiscard]] int32_t size() const { return static_cast<int32_t>(executors_.size()); }
  [[nodiscard]] CpuExecutor& rank(int32_t rank) { return *executors_[static_cast<size_t>(rank)]; }
  [[nodiscard]] const weights::MemoryPlan& plan() const { return plan_; }

 private:
  LocalGroup() = default;

  weights::MemoryPlan plan_;
  std::unique_ptr<collectives::ShmRegion> region_;  // several ranks only
  std::vector<std::unique_ptr<collectives::Communicator>> communicators_;
  std::vector<std::unique_ptr<CpuExecutor>> executors_;
  step::StepResult other_;  // of a rank beside rank 0
};

}  // namespace nibble::execution
