// What the leader's main thread does while the engine and the server work: waits for commands.
#pragma once

#include <functional>
#include <optional>

#include "absl/status/status.h"
#include "base/clock.h"
#include "worker/group/supervisor.h"
#include "worker/rpc/leader.h"

namespace nibble::worker {

struct LeaderLoopOptions {
  // Readable when a command has come; Next() then reads one, nullopt when there is none after all.
  // -1: no commands.
  int command_fd = -1;
  std::function<std::optional<group::Command>()> next_command;
  // Called first on an abort: makes pending and later steps fail.
  std::function<void()> on_abort = [] {};
  Duration drain_timeout = std::chrono::seconds(60);
  // How long the last messages of streams may take to leave.
  Duration grace = std::chrono::seconds(1);
  const Clock* clock = nullptr;  // borrowed
};

// Returns when the leader has ended: OK after a drain (what was late ended UNAVAILABLE), ABORTED
// after an abort, else the engine's fault.
[[nodiscard]] absl::Status RunLeaderLoop(rpc::Leader* leader, const LeaderLoopOptions& options);

}  // namespace nibble::worker
