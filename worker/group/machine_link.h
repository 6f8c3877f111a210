// A group whose ranks are on several machines, as the supervisor of one of them sees the others.
// The first machine (index 0) has the leader; each other one keeps a stream to it.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>

#include "base/clock.h"
#include "worker/group/group_control.h"
#include "worker/group/group_end.h"

namespace nibble::group {

// How often each side of a link says that it lives.
inline constexpr Duration kBeatInterval = std::chrono::milliseconds(250);

// All calls come from the supervisor's thread and return at once, but for End().
class MachineLink {
 public:
  virtual ~MachineLink() = default;

  // Every machine has come. From then on the loss of one is the end of the group.
  [[nodiscard]] virtual bool Joined() const = 0;
  // Why this machine's ranks must end: another machine ended, is silent or never came.
  [[nodiscard]] virtual std::optional<GroupEnd> Lost(Deadline now) = 0;
  // Another machine has been told to drain, and with it the group.
  [[nodiscard]] virtual bool DrainAsked() const = 0;
  // This machine drains: tells the others.
  virtual void Drain() = 0;
  // This machine's ranks end: tells the others, for at most `patience`.
  virtual void End(const GroupEnd& end, Duration patience) = 0;
};

// Which part of a group a machine is.
struct MachinePlace {
  int32_t index = 0;
  int32_t machines = 1;
  int32_t ranks_each = 1;

  [[nodiscard]] RankRange RanksOf(int32_t machine) const {
    return {.first = machine * ranks_each, .count = ranks_each};
  }
  [[nodiscard]] RankRange own_ranks() const { return RanksOf(index); }
  [[nodiscard]] int32_t rank_count() const { return machines * ranks_each; }
};

// Tells a silent peer from a time in which this process itself stood still. One thread.
class SilenceWatch {
 public:
  explicit SilenceWatch(Duration limit) : limit_(limit) {}

  // Called several times a second, before TooLong().
  void Observe(Deadline now) {
    if (last_observed_ == Deadline{} || now - last_observed_ > limit_ / 2) blameless_until_ = now;
    last_observed_ = now;
  }
  [[nodiscard]] bool TooLong(Deadline now, Deadline last_heard) const {
    return now - std::max(last_heard, blameless_until_) > limit_;
  }
  [[nodiscard]] Duration limit() const { return limit_; }

 private:
  const Duration limit_;
  Deadline last_observed_{};
  Deadline blameless_until_{};
};

// What another machine's end means for this one's: its code where that says why, else a lost rank.
[[nodiscard]] GroupEnd EndBecauseOf(int32_t machine, uint32_t exit_code, std::string_view reason);

}  // namespace nibble::group
