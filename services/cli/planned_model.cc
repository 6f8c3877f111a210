#include "services/cli/planned_model.h"

#include "base/exit_codes.h"
#include "worker/execution/cuda/gpu_rank.h"

namespace nibble::cli {

absl::StatusOr<PlannedModel> OpenAndPlan(const std::string& folder, int32_t tp,
                                         const std::string& device,
                                         const weights::MemoryOptions& options, int* exit_code) {
  *exit_code = kExitModel;
  auto checkpoint = weights::Checkpoint::Open(folder);
  if (!checkpoint.ok()) return checkpoint.status();
  auto plan = device == "cuda" ? execution::PlanGpuMemory({.checkpoint = checkpoint->get()}, tp,
                                                          {.memory = options})
                               : weights::PlanMemory(**checkpoint, tp, options);
  if (plan.ok()) return PlannedModel{*std::move(checkpoint), *std::move(plan)};
  if (absl::IsResourceExhausted(plan.status())) {
    *exit_code = kExitNoMemory;
  } else if (weights::PlanMemory(**checkpoint, 1,
                                 {.numerics = options.numerics, .head = options.head})
                 .ok()) {
    // The folder is sound: what was asked of it is not.
    *exit_code = kExitConfiguration;
  }
  return plan.status();
}

}  // namespace nibble::cli
