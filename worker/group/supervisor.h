// Keeps the ranks of one machine together: starts one process each, and when one of them or another
// machine of the group ends or hangs, ends them all and says why. A group has no partial life.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/clock.h"
#include "worker/group/group_control.h"
#include "worker/group/group_end.h"
#include "worker/group/hang_watch.h"
#include "worker/group/machine_link.h"
#include "worker/group/rank_process.h"
#include "worker/step/group_stats.h"

namespace nibble::group {

// Bytes that the supervisor writes to the leader's command pipe.
enum class Command : char {
  kDrain = 'D',  // take nothing new, finish what there is, leave with exit code 0
  kAbort = 'A',  // a peer is lost: end every stream UNAVAILABLE and leave
};

// The descriptors of one rank, beside those that all share.
struct RankDescriptors {
  int32_t rank = 0;
  int death_fd = -1;    // reads end of file when the rank must end
  int command_fd = -1;  // the leader's alone
};

struct SupervisorOptions {
  int32_t ranks = 1;  // of this machine
  // In a group over several machines: the first of this machine's ranks, all of the group's, and
  // the others (borrowed).
  int32_t first_rank = 0;
  int32_t group_ranks = 0;  // 0 = `ranks`
  MachineLink* others = nullptr;
  std::string executable;
  std::function<std::vector<std::string>(const RankDescriptors&)> arguments;
  std::vector<int> shared_fds;  // inherited by every rank under the same number
  // Borrowed; outlive the supervisor.
  GroupControl* control = nullptr;
  step::GroupStats* stats = nullptr;
  const Clock* clock = nullptr;

  HangWatchOptions hang;
  Duration load_stall = std::chrono::seconds(120);  // loading without a byte's progress
  Duration drain_timeout = std::chrono::seconds(60);
  Duration kill_after = std::chrono::seconds(2);  // from "end" to SIGKILL, at most

  // Called on Run()'s thread while ranks load, with bytes of all ranks together.
  std::function<void(int64_t done, int64_t total)> on_load_progress = [](int64_t, int64_t) {};
  // Called once every rank serves, with the leader's address. An error ends the group
  // (kExitConfiguration).
  std::function<absl::Status(const std::string& address)> on_serving = [](const std::string&) {
    return absl::OkStatus();
  };
};

class Supervisor {
 public:
  explicit Supervisor(SupervisorOptions options);

  // Starts the ranks and returns when none is left. SIGTERM or SIGINT drains the group; a second
  // one ends it. REQUIRES: both are blocked in every thread of this process, and SIGPIPE is
  // ignored; the calling thread lives as long as the process does.
  [[nodiscard]] GroupEnd Run();

  // For probes; any thread.
  [[nodiscard]] absl::Status Ready() const;
  [[nodiscard]] absl::Status Live() const;

 private:
  enum class State : int { kLoading, kServing, kDraining, kEnding };
  struct Rank {
    RankProcess process;
    OwnedFd death_pipe;  // closed to end the rank
    bool told_to = false;
  };

  absl::Status StartRanks();
  // The loop until something ends the group; the cause where it is not in how a rank ended.
  [[nodiscard]] std::optional<GroupEnd> Watch(int signal_fd);
  void WaitForEvents(int signal_fd, Duration wait);
  [[nodiscard]] std::optional<GroupEnd> HandleSignals(int signal_fd);
  void BeginDrain(const char* why);
  // The cause of the end, told to the other machines before the ranks are ended.
  void TellOthers(const std::optional<GroupEnd>& cause);
  [[nodiscard]] std::optional<GroupEnd> Tick();
  [[nodiscard]] std::optional<GroupEnd> TickLoading(Deadline now);
  [[nodiscard]] std::optional<GroupEnd> TickHang(Deadline now);
  // What each rank is doing, for whoever asks later why a group hung.
  void LogRanks(Deadline now) const;
  [[nodiscard]] bool AllServe() const;
  // True when a rank has ended otherwise than a drain allows.
  [[nodiscard]] bool RankLost();
  [[nodiscard]] bool AllGone();
  // One whose signal explains the end: no need to wait for more.
  [[nodiscard]] bool SomeRankWasKilled();
  // `serving`: the leader may have streams to end.
  void EndRanks(bool serving);
  // From "end" to SIGKILL.
  [[nodiscard]] Duration EndPatience() const;
  void AwaitGone(Deadline deadline);
  // Of the ranks that are gone, and of the others too where that is asked for.
  [[nodiscard]] std::vector<RankEnd> CollectEnds(bool all);
  [[nodiscard]] const RankSlot& SlotOf(int32_t rank) const {
    return options_.control->ranks[static_cast<size_t>(rank)];
  }
  [[nodiscard]] bool HasLeader() const { return options_.first_rank == 0; }
  void Tell(Command command);

  SupervisorOptions options_;
  HangWatch hang_watch_;
  std::vector<Rank> ranks_;
  OwnedFd command_pipe_;
  std::atomic<State> state_{State::kLoading};
  std::atomic<HangWatch::Verdict> verdict_{HangWatch::Verdict::kFine};
  int32_t hung_rank_ = -1;  // index in ranks_; killed without being asked to leave
  int64_t loaded_bytes_ = -1;
  Deadline load_progress_at_{};
  Deadline drain_until_{};
  Deadline leader_left_at_ = Deadline::max();
};

}  // namespace nibble::group
