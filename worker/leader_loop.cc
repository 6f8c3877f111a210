#include "worker/leader_loop.h"

#include <poll.h>

#include <array>

#include "base/logging.h"

namespace nibble::worker {
namespace {

constexpr int kDrainPollMs = 20;

// Waits for a command or for the engine's end.
std::optional<group::Command> AwaitCommand(const rpc::Leader& leader,
                                           const LeaderLoopOptions& options, int timeout_ms) {
  std::array<pollfd, 2> events = {{{.fd = leader.ended_fd(), .events = POLLIN, .revents = 0},
                                   {.fd = options.command_fd, .events = POLLIN, .revents = 0}}};
  ::poll(events.data(), events.size(), timeout_ms);
  return (events[1].revents & POLLIN) != 0 ? options.next_command() : std::nullopt;
}

}  // namespace

absl::Status RunLeaderLoop(rpc::Leader* leader, const LeaderLoopOptions& options) {
  std::optional<Deadline> drain_until;
  while (!leader->ended()) {
    const auto command =
        AwaitCommand(*leader, options, drain_until.has_value() ? kDrainPollMs : -1);
    if (command == group::Command::kAbort) {
      options.on_abort();
      (void)leader->Stop(options.grace);
      return absl::AbortedError("a rank of the group was lost");
    }
    if (command == group::Command::kDrain && !drain_until.has_value()) {
      drain_until = options.clock->Now() + options.drain_timeout;
      leader->Drain();
    }
    if (!drain_until.has_value()) continue;
    if (leader->idle()) break;
    if (options.clock->Now() >= *drain_until) {
      spdlog::warn("the drain's time is over; what still runs ends UNAVAILABLE");
      break;
    }
  }
  return leader->Stop(options.grace);
}

}  // namespace nibble::worker
