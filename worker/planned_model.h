// The model folder as every process of a group opens it: headers only, until a rank loads its
// share.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "base/exit_codes.h"
#include "worker/execution/cuda/gpu_rank.h"
#include "worker/group/group_control.h"
#include "worker/group/group_metrics.h"
#include "worker/options.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/memory_plan.h"

namespace nibble::worker {

// An error and the exit code that says whose it is.
struct Failure {
  int exit_code = kExitDrained;
  absl::Status status;
  [[nodiscard]] bool ok() const { return status.ok(); }
};

struct PlannedModel {
  std::unique_ptr<weights::Checkpoint> checkpoint;
  weights::MemoryPlan plan;
};

// kExitModel: the folder; kExitNoMemory: the budget; kExitConfiguration: an option that this model
// does not allow.
// `gpu`: this rank's, where ranks compute on GPUs; nullptr: not known yet, and memory enough.
[[nodiscard]] Failure OpenAndPlan(const WorkerOptions& options, const execution::GpuInfo* gpu,
                                  PlannedModel* model);

// What the ranks compare when they meet.
[[nodiscard]] group::RankFacts FactsOf(const WorkerOptions& options, const PlannedModel& model);

// What stands in the group's metrics.
[[nodiscard]] group::GroupFacts MetricFactsOf(const WorkerOptions& options,
                                              const PlannedModel& model);

}  // namespace nibble::worker
