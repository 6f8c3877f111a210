#include "worker/group/hang_watch.h"

#include <algorithm>

namespace nibble::group {
namespace {

Deadline At(int64_t stamp_ns) { return Deadline(Duration(stamp_ns)); }

bool HasWork(const step::EngineStats& engine) {
  return engine.requests_running.Get() > 0 || engine.requests_waiting.Get() > 0 ||
         engine.steps_in_flight.Get() > 0;
}

}  // namespace

HangWatch::Finding HangWatch::Observe(Deadline now, const step::GroupStats& stats) {
  const bool stood_still = last_observed_ != Deadline{} && now - last_observed_ > options_.soft / 2;
  last_observed_ = now;
  Finding worst;
  for (int32_t rank = first_rank_; rank < first_rank_ + ranks_; ++rank) {
    const auto index = static_cast<size_t>(rank);
    const step::RankStats& of_rank = stats.ranks[index];
    const bool watched = of_rank.up.Get() != 0 && (rank != 0 || HasWork(stats.engine));
    if (!watched || stood_still) {
      blameless_until_[index] = now;
      continue;
    }
    Deadline stamp = std::max(blameless_until_[index], At(of_rank.progress_ns.Get()));
    if (rank == 0) stamp = std::max(stamp, At(stats.engine.last_step_ns.Get()));
    const Duration age = now - stamp;
    if (age > worst.age) worst = {.verdict = Verdict::kFine, .rank = rank, .age = age};
  }
  if (worst.age >= options_.hard) {
    worst.verdict = Verdict::kHard;
  } else if (worst.age >= options_.soft) {
    worst.verdict = Verdict::kSoft;
  }
  return worst;
}

}  // namespace nibble::group
