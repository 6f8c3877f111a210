// Decides from the ranks' progress stamps whether a group hangs. Pure: time and stamps come in.
#pragma once

#include <array>
#include <cstdint>

#include "base/clock.h"
#include "worker/step/group_stats.h"

namespace nibble::group {

struct HangWatchOptions {
  Duration soft = std::chrono::seconds(5);   // worth a line in the log
  Duration hard = std::chrono::seconds(10);  // the group ends
};

// One thread calls, several times a second.
class HangWatch {
 public:
  enum class Verdict { kFine, kSoft, kHard };
  struct Finding {
    Verdict verdict = Verdict::kFine;
    int32_t rank = 0;   // the one whose stamp is oldest
    Duration age = {};  // of that stamp
  };

  // Of the `ranks` ranks from `first_rank` on: a machine's own. Stamps of other machines' clocks
  // would say nothing.
  HangWatch(HangWatchOptions options, int32_t ranks, int32_t first_rank = 0)
      : options_(options), first_rank_(first_rank), ranks_(ranks) {}

  // The leader is late only while it has work: an idle engine has nothing to stamp. A follower
  // stamps when idle too. A rank that is not up yet is never late.
  [[nodiscard]] Finding Observe(Deadline now, const step::GroupStats& stats);

 private:
  const HangWatchOptions options_;
  const int32_t first_rank_;
  const int32_t ranks_;
  Deadline last_observed_{};
  // Nobody can be blamed for what was before: the rank came up, work came, or this process itself
  // stood still (a frozen container looks like a hang of all ranks when it thaws).
  std::array<Deadline, step::kMaxRanks> blameless_until_{};
};

}  // namespace nibble::group
