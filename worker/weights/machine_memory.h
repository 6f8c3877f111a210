// Whether a plan fits the machine at all, so that what cannot is refused before anything is loaded.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "worker/weights/memory_plan.h"

namespace nibble::weights {

// The machine's memory in bytes, or this control group's limit (cgroup v2, memory.max) where that
// is less. Not what is free: page cache gives way.
[[nodiscard]] int64_t MachineMemory();

// RESOURCE_EXHAUSTED with the numbers where all ranks of `plan` together need more than
// `machine_bytes`.
[[nodiscard]] absl::Status CheckFits(const MemoryPlan& plan, int64_t machine_bytes);

}  // namespace nibble::weights
