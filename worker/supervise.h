// nibble-worker without --rank: the supervisor of its machine.
#pragma once

#include "worker/options.h"

namespace nibble::worker {

// Refuses what cannot be served before any port opens or process starts, then keeps the group until
// it ends. Prints why on standard error where that was no drain. Returns the exit code.
// REQUIRES: SIGTERM and SIGINT are blocked in every thread.
[[nodiscard]] int Supervise(const WorkerOptions& options);

}  // namespace nibble::worker
