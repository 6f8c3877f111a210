#include "worker/group/group_end.h"

#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/exit_codes.h"

namespace nibble::group {
namespace {

// Lower is more telling.
int Rating(const RankEnd& end) {
  const bool noted = end.reason_code != 0;
  if (noted && end.reason_code != kExitRankLost) return 0;
  if (!end.told_to && end.exit.signal != 0) return 1;
  if (noted) return 2;
  if (!end.told_to) return 3;
  return 4;
}

GroupEnd Explain(const RankEnd& end) {
  if (end.reason_code != 0) {
    const bool known = end.reason_code >= kExitConfiguration && end.reason_code <= kExitDeviceFault;
    return {.exit_code = known ? end.reason_code : int{kExitRankLost},
            .reason = absl::StrCat("rank ", end.rank, ": ", end.reason)};
  }
  if (end.exit.signal != 0) {
    return {.exit_code = kExitRankLost,
            .reason = absl::StrCat("rank ", end.rank, " was killed by signal ", end.exit.signal,
                                   " (", ::strsignal(end.exit.signal), ")")};
  }
  return {.exit_code = kExitRankLost,
          .reason = absl::StrCat("rank ", end.rank, " left with exit code ", end.exit.code)};
}

}  // namespace

GroupEnd ExplainEnd(std::span<const RankEnd> ends) {
  CHECK(!ends.empty());
  const RankEnd* best = &ends.front();
  for (const RankEnd& end : ends) {
    if (Rating(end) < Rating(*best)) best = &end;
  }
  return Explain(*best);
}

}  // namespace nibble::group
