// Ends a rank when its supervisor ends or tells it to.
#pragma once

#include "absl/status/status.h"

namespace nibble::group {

// Asks the kernel to kill this process when its parent thread ends, and starts a thread that waits
// for the end of file of `death_fd`, whose other end the supervisor holds, and then calls _exit()
// with kExitRankLost: no lock, no destructor, nothing that could hang. Called first thing in a
// rank; the thread runs as long as the process does.
[[nodiscard]] absl::Status StartPeerWatch(int death_fd);

}  // namespace nibble::group
