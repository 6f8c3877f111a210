// Why a group ended, from how each of its ranks did. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "worker/group/rank_process.h"

namespace nibble::group {

// What the supervisor exits with, and the one line that says why.
struct GroupEnd {
  int exit_code = 0;
  std::string reason = {};
};

struct RankEnd {
  int32_t rank = 0;
  ProcessExit exit;
  int reason_code = 0;  // what the rank noted before it ended; 0 = nothing
  std::string reason = {};
  bool told_to = false;  // the supervisor ended it, or it ended after the group was told to
};

// The most telling of the ends: what a rank noted of its own fault, then a rank that was killed,
// then one that lost its peers, then one that simply left. REQUIRES: !ends.empty().
[[nodiscard]] GroupEnd ExplainEnd(std::span<const RankEnd> ends);

}  // namespace nibble::group
