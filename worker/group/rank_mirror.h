// The ranks of one machine as another sees them: out of the shared memory into messages, and back
// into the other machine's shared memory.
#pragma once

#include "absl/status/status.h"
#include "nibble/worker/v1/group.pb.h"
#include "worker/group/group_control.h"
#include "worker/step/group_stats.h"

namespace nibble::group {

// Adds the states of `ranks` to *beat.
void AddRanks(const GroupControl& control, const step::GroupStats& stats, RankRange ranks,
              worker::v1::Beat* beat);

// Writes the states into the slots that they are of. INVALID_ARGUMENT, and nothing is written,
// where one is of a rank outside `allowed` or is nonsense.
[[nodiscard]] absl::Status ApplyRanks(const worker::v1::Beat& beat, RankRange allowed,
                                      GroupControl* control, step::GroupStats* stats);

void FillFacts(const RankFacts& facts, worker::v1::Hello* hello);
[[nodiscard]] RankFacts FactsOf(const worker::v1::Hello& hello);

}  // namespace nibble::group
