// One rank of a group, as a process.
#pragma once

#include "worker/options.h"
#include "worker/rank_arguments.h"

namespace nibble::worker {

// Loads this rank's share, meets the others and runs steps until the group ends; rank 0 schedules
// and serves. Returns the exit code; why stands in the group's control block.
[[nodiscard]] int RunRank(const WorkerOptions& options, const RankArguments& arguments);

}  // namespace nibble::worker
