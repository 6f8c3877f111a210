#include "worker/group/supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/exit_codes.h"
#include "base/logging.h"
#include "base/status.h"

namespace nibble::group {
namespace {

constexpr Duration kTickMax = std::chrono::milliseconds(100);
// A rank that noticed the loss of another may be seen to leave before the one that caused it.
constexpr Duration kMoreTellingEndMax = std::chrono::milliseconds(300);
// From SIGKILL to leaving a process behind that waits in the kernel (a disk, a device).
constexpr Duration kKilledGoneMax = std::chrono::seconds(2);
// For the other machines to have read that this one ends.
constexpr Duration kTellOthersMax = std::chrono::milliseconds(300);
// The leader counts the drain's time itself; it gets this much more to leave.
constexpr Duration kDrainGrace = std::chrono::seconds(3);

std::string ReadOfProcess(pid_t pid, const char* file_name) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/", file_name));
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// The state letter of /proc/PID/stat: T is a stopped process, D one that waits for a disk.
char ProcessState(pid_t pid) {
  const std::string text = ReadOfProcess(pid, "stat");
  const size_t name_end = text.rfind(')');
  return name_end != std::string::npos && name_end + 2 < text.size() ? text[name_end + 2] : '?';
}

OwnedFd MakeSignalFd() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return OwnedFd(::signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
}

double Seconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }

}  // namespace

Supervisor::Supervisor(SupervisorOptions options)
    : options_(std::move(options)),
      hang_watch_(options_.hang, options_.ranks, options_.first_rank) {
  if (options_.group_ranks == 0) options_.group_ranks = options_.ranks;
}

GroupEnd Supervisor::Run() {
  const OwnedFd signal_fd = MakeSignalFd();
  const absl::Status started = StartRanks();
  std::optional<GroupEnd> cause;
  if (!started.ok()) {
    cause = GroupEnd{.exit_code = kExitRankLost, .reason = std::string(started.message())};
  } else {
    cause = Watch(signal_fd.get());
  }
  if (!cause.has_value() && !SomeRankWasKilled()) {
    // A rank left; another, of this machine or not, may say why.
    AwaitGone(options_.clock->Now() + std::min(kMoreTellingEndMax, options_.hang.hard / 4));
    if (options_.others != nullptr) cause = options_.others->Lost(options_.clock->Now());
  }
  TellOthers(cause);
  const bool serving = state_.exchange(State::kEnding) != State::kLoading;
  EndRanks(serving);
  if (cause.has_value()) return *cause;
  return ExplainEnd(CollectEnds(true));
}

void Supervisor::TellOthers(const std::optional<GroupEnd>& cause) {
  if (options_.others == nullptr) return;
  const std::vector<RankEnd> ends = CollectEnds(false);
  GroupEnd end{.exit_code = kExitRankLost, .reason = "a rank was lost"};
  if (cause.has_value()) {
    end = *cause;
  } else if (!ends.empty()) {
    end = ExplainEnd(ends);
  }
  options_.others->End(end, std::min(kTellOthersMax, EndPatience() / 4));
}

absl::Status Supervisor::StartRanks() {
  ASSIGN_OR_RETURN(Pipe command, MakePipe());
  // A leader that reads no commands must not block this process.
  ::fcntl(command.write.get(), F_SETFL, O_NONBLOCK);
  command_pipe_ = std::move(command.write);
  load_progress_at_ = options_.clock->Now();
  for (int32_t i = 0; i < options_.ranks; ++i) {
    const int32_t rank = options_.first_rank + i;
    ASSIGN_OR_RETURN(Pipe death, MakePipe());
    const RankDescriptors descriptors{.rank = rank,
                                      .death_fd = death.read.get(),
                                      .command_fd = rank == 0 ? command.read.get() : -1};
    std::vector<int> inherited = options_.shared_fds;
    inherited.push_back(descriptors.death_fd);
    if (rank == 0) inherited.push_back(descriptors.command_fd);
    ASSIGN_OR_RETURN(
        RankProcess process,
        RankProcess::Start(options_.executable, options_.arguments(descriptors), inherited));
    spdlog::debug("rank {} is process {}", rank, process.pid());
    ranks_.push_back({.process = std::move(process), .death_pipe = std::move(death.write)});
  }
  return absl::OkStatus();
}

std::optional<GroupEnd> Supervisor::Watch(int signal_fd) {
  // Far below what counts as having stood still.
  const Duration tick = std::min(kTickMax, options_.hang.hard / 16);
  for (;;) {
    WaitForEvents(signal_fd, tick);
    if (auto end = HandleSignals(signal_fd)) return end;
    if (RankLost()) return std::nullopt;
    if (state_ == State::kDraining && AllGone()) return GroupEnd{.reason = "drained"};
    if (auto end = Tick()) return end;
  }
}

void Supervisor::WaitForEvents(int signal_fd, Duration wait) {
  std::vector<pollfd> events;
  if (signal_fd >= 0) events.push_back({.fd = signal_fd, .events = POLLIN, .revents = 0});
  for (Rank& rank : ranks_) {
    if (rank.process.Exited()) continue;
    events.push_back({.fd = rank.process.pidfd(), .events = POLLIN, .revents = 0});
  }
  const auto ms = std::chrono::ceil<std::chrono::milliseconds>(std::max(Duration::zero(), wait));
  ::poll(events.data(), events.size(), static_cast<int>(ms.count()));
}

std::optional<GroupEnd> Supervisor::HandleSignals(int signal_fd) {
  signalfd_siginfo info{};
  while (::read(signal_fd, &info, sizeof(info)) == sizeof(info)) {
    switch (state_.load()) {
      case State::kLoading:
        return GroupEnd{.reason = "stopped while loading"};
      case State::kServing:
        BeginDrain("a second signal ends the group at once");
        break;
      case State::kDraining:
        return GroupEnd{.exit_code = kExitFailure, .reason = "stopped before it was drained"};
      case State::kEnding:
        break;
    }
  }
  return std::nullopt;
}

void Supervisor::BeginDrain(const char* why) {
  spdlog::info("draining; {}", why);
  state_ = State::kDraining;
  drain_until_ = options_.clock->Now() + options_.drain_timeout + kDrainGrace;
  // The machine with the leader gives up first: it knows what was late.
  if (!HasLeader()) drain_until_ += kDrainGrace;
  Tell(Command::kDrain);
  if (options_.others != nullptr) options_.others->Drain();
}

std::optional<GroupEnd> Supervisor::Tick() {
  const Deadline now = options_.clock->Now();
  if (options_.others != nullptr) {
    if (auto lost = options_.others->Lost(now)) return lost;
    if (state_ == State::kServing && options_.others->DrainAsked()) {
      BeginDrain("another machine of the group was told to");
    }
  }
  if (state_ == State::kLoading) return TickLoading(now);
  if (state_ == State::kDraining) {
    if (ranks_[0].process.Exited().has_value()) {
      leader_left_at_ = std::min(leader_left_at_, now);
      if (now - leader_left_at_ > options_.kill_after) {
        return GroupEnd{.reason = "drained; a rank that did not leave was killed"};
      }
      return std::nullopt;  // what is left has no more steps to be late with
    }
    if (now > drain_until_) {
      return GroupEnd{.exit_code = kExitHang, .reason = "the leader did not end its drain"};
    }
  }
  return TickHang(now);
}

std::optional<GroupEnd> Supervisor::TickLoading(Deadline now) {
  int64_t done = 0;
  int64_t total = 0;
  for (int32_t rank = 0; rank < options_.group_ranks; ++rank) {
    done += SlotOf(rank).load_bytes_done;
    total += SlotOf(rank).load_bytes_total;
  }
  // Until every machine has come there is nothing to load, and the join has a time of its own.
  const bool waits = options_.others != nullptr && !options_.others->Joined();
  if (done != loaded_bytes_ || waits) {
    loaded_bytes_ = done;
    load_progress_at_ = now;
    if (total > 0) options_.on_load_progress(std::min(done, total), total);
  }
  if (AllServe()) {
    const absl::Status status = options_.on_serving(options_.control->address.Get().value_or(""));
    if (!status.ok()) {
      return GroupEnd{.exit_code = kExitConfiguration, .reason = std::string(status.message())};
    }
    state_ = State::kServing;
    return std::nullopt;
  }
  if (now - load_progress_at_ > options_.load_stall) {
    return GroupEnd{.exit_code = kExitHang,
                    .reason = absl::StrCat("loading made no progress for ",
                                           Seconds(options_.load_stall), " s")};
  }
  return std::nullopt;
}

std::optional<GroupEnd> Supervisor::TickHang(Deadline now) {
  const HangWatch::Finding finding = hang_watch_.Observe(now, *options_.stats);
  const HangWatch::Verdict before = verdict_.exchange(finding.verdict);
  if (finding.verdict == HangWatch::Verdict::kFine) return std::nullopt;
  const int32_t index = finding.rank - options_.first_rank;
  const pid_t pid = ranks_[static_cast<size_t>(index)].process.pid();
  const std::string what = absl::StrCat("rank ", finding.rank, " (process ", pid, ", state ",
                                        std::string(1, ProcessState(pid)),
                                        ") made no progress for ", Seconds(finding.age), " s");
  if (finding.verdict == HangWatch::Verdict::kSoft) {
    if (before == HangWatch::Verdict::kFine) {
      spdlog::warn("{}", what);
      LogRanks(now);
    }
    return std::nullopt;
  }
  hung_rank_ = index;
  return GroupEnd{.exit_code = kExitHang, .reason = what};
}

void Supervisor::LogRanks(Deadline now) const {
  for (size_t i = 0; i < ranks_.size(); ++i) {
    const int32_t rank = options_.first_rank + static_cast<int32_t>(i);
    const step::RankStats& stats = options_.stats->ranks[static_cast<size_t>(rank)];
    const pid_t pid = ranks_[i].process.pid();
    const std::string waits = ReadOfProcess(pid, "wchan");
    spdlog::warn(
        "rank {}: process {}, state {}, in the kernel at {}, {} steps, {} collective bytes, "
        "last progress {:.2f} s ago",
        rank, pid, ProcessState(pid), waits.empty() || waits == "0" ? "nothing" : waits,
        stats.steps.Get(), stats.collective_bytes.Get(),
        Seconds(now - Deadline(Duration(stats.progress_ns.Get()))));
  }
  if (!HasLeader()) return;
  const step::EngineStats& engine = options_.stats->engine;
  spdlog::warn("engine: {} steps in flight, {} requests running, {} waiting, {} KV blocks used",
               engine.steps_in_flight.Get(), engine.requests_running.Get(),
               engine.requests_waiting.Get(), engine.kv_blocks_used.Get());
}

bool Supervisor::AllServe() const {
  if (!options_.control->address.Get().has_value()) return false;
  for (int32_t rank = 0; rank < options_.group_ranks; ++rank) {
    if (SlotOf(rank).phase.load(std::memory_order_acquire) != RankPhase::kServing) return false;
  }
  return true;
}

bool Supervisor::RankLost() {
  return std::any_of(ranks_.begin(), ranks_.end(), [this](Rank& rank) {
    const std::optional<ProcessExit> exit = rank.process.Exited();
    if (!exit.has_value()) return false;
    return state_ != State::kDraining || exit->signal != 0 || exit->code != kExitDrained;
  });
}

bool Supervisor::AllGone() {
  return std::all_of(ranks_.begin(), ranks_.end(),
                     [](Rank& rank) { return rank.process.Exited().has_value(); });
}

void Supervisor::AwaitGone(Deadline deadline) {
  while (!AllGone()) {
    const Duration left = deadline - options_.clock->Now();
    if (left <= Duration::zero()) return;
    WaitForEvents(-1, left);
  }
}

bool Supervisor::SomeRankWasKilled() {
  return std::any_of(ranks_.begin(), ranks_.end(), [](Rank& rank) {
    const std::optional<ProcessExit> exit = rank.process.Exited();
    return exit.has_value() && exit->signal != 0;
  });
}

Duration Supervisor::EndPatience() const {
  // A hang takes a deadline to be seen, by this process or by a rank that waits for another;
  // streams are promised to end within two.
  return std::min(options_.kill_after, options_.hang.hard / 2);
}

void Supervisor::EndRanks(bool serving) {
  const Deadline begin = options_.clock->Now();
  const Duration patience = EndPatience();
  Tell(Command::kAbort);
  for (size_t i = 0; i < ranks_.size(); ++i) {
    if (ranks_[i].process.Exited().has_value()) continue;
    ranks_[i].told_to = true;
    // A leader that serves first ends its streams.
    if (i != 0 || !HasLeader() || !serving) ranks_[i].death_pipe.Close();
  }
  if (hung_rank_ >= 0) ranks_[static_cast<size_t>(hung_rank_)].process.Signal(SIGKILL);
  // The rank whose stamp is oldest may be one that waits for the one that is stopped.
  for (Rank& rank : ranks_) {
    if (!rank.process.Exited() && ProcessState(rank.process.pid()) == 'T') {
      rank.process.Signal(SIGKILL);
    }
  }
  // A follower leaves as soon as its pipe is closed; one that does not is stuck.
  AwaitGone(begin + patience / 4);
  for (size_t i = HasLeader() ? 1 : 0; i < ranks_.size(); ++i) ranks_[i].process.Signal(SIGKILL);
  AwaitGone(begin + patience);
  for (Rank& rank : ranks_) rank.process.Signal(SIGKILL);
  AwaitGone(options_.clock->Now() + kKilledGoneMax);
  for (Rank& rank : ranks_) {
    if (rank.process.Exited().has_value()) continue;
    // The kernel ends it as soon as it can; whoever restarts the group looks for it.
    spdlog::error("process {} (state {}) cannot be killed and is left behind", rank.process.pid(),
                  ProcessState(rank.process.pid()));
    rank.process.Abandon();
  }
}

std::vector<RankEnd> Supervisor::CollectEnds(bool all) {
  std::vector<RankEnd> ends;
  for (size_t i = 0; i < ranks_.size(); ++i) {
    if (!all && !ranks_[i].process.Exited().has_value()) continue;
    const int32_t rank = options_.first_rank + static_cast<int32_t>(i);
    const RankSlot& slot = SlotOf(rank);
    const std::optional<std::string> reason = slot.exit_reason.Get();
    ends.push_back({.rank = rank,
                    .exit = ranks_[i].process.Exited().value_or(ProcessExit{}),
                    .reason_code = reason.has_value() ? slot.exit_code.load() : 0,
                    .reason = reason.value_or(""),
                    .told_to = ranks_[i].told_to});
  }
  return ends;
}

void Supervisor::Tell(Command command) {
  const char byte = static_cast<char>(command);
  // A leader that is gone or deaf is dealt with by its pidfd and by the deadlines.
  if (command_pipe_.valid() && ::write(command_pipe_.get(), &byte, 1) != 1) {
    spdlog::debug("the leader takes no commands");
  }
}

absl::Status Supervisor::Ready() const {
  switch (state_.load()) {
    case State::kLoading:
      return absl::UnavailableError("the model is loading");
    case State::kDraining:
      return absl::UnavailableError("the group is draining");
    case State::kEnding:
      return absl::UnavailableError("the group is ending");
    case State::kServing:
      break;
  }
  if (verdict_ != HangWatch::Verdict::kFine) return absl::UnavailableError("a rank is late");
  if (options_.stats->engine.draining.Get() != 0) {
    return absl::UnavailableError("the group is draining");
  }
  return absl::OkStatus();
}

absl::Status Supervisor::Live() const {
  if (verdict_ == HangWatch::Verdict::kHard) return absl::UnavailableError("a rank hangs");
  return absl::OkStatus();
}

}  // namespace nibble::group
