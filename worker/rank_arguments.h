// The front of a rank's command line: which rank it is and the descriptors that it inherited.
// Internal: only the supervisor writes them.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble::worker {

struct RankArguments {
  int32_t rank = 0;
  int stats_fd = -1;        // group::SharedObject<step::GroupStats>
  int control_fd = -1;      // group::SharedObject<group::GroupControl>
  int ring_fd = -1;         // the plan ring; -1 in a group of one rank
  int collectives_fd = -1;  // collectives::ShmRegion; -1 in a group of one rank
  int death_fd = -1;
  int command_fd = -1;  // the leader's
};

// "--rank=1", "--stats-fd=5", ...
[[nodiscard]] std::vector<std::string> Format(const RankArguments& arguments);

// Takes them off the front of *words. nullopt where the first word is no --rank: this process is
// the supervisor. INVALID_ARGUMENT names what is missing or no number.
[[nodiscard]] absl::StatusOr<std::optional<RankArguments>> TakeRankArguments(
    std::vector<std::string>* words);

}  // namespace nibble::worker
