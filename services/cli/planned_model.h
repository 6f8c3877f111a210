// A model folder opened and planned, as every command that touches one begins.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/memory_plan.h"

namespace nibble::cli {

struct PlannedModel {
  std::unique_ptr<weights::Checkpoint> checkpoint;
  weights::MemoryPlan plan;
};

// Reads headers only. On failure *exit_code says whose fault it is: kExitModel (the folder),
// kExitNoMemory (the budget) or kExitConfiguration (an option that this model does not allow).
// `device`: "cpu", or "cuda", whose memory is not asked for here.
[[nodiscard]] absl::StatusOr<PlannedModel> OpenAndPlan(const std::string& folder, int32_t tp,
                                                       const std::string& device,
                                                       const weights::MemoryOptions& options,
                                                       int* exit_code);

}  // namespace nibble::cli
