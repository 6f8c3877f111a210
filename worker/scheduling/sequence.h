// One request as the scheduler sees it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/priority.h"
#include "worker/scheduling/prefix_names.h"
#include "worker/step/step_plan.h"

namespace nibble::scheduling {

// What a caller asks for. REQUIRES (the engine checks): 1 <= prompt and max_tokens, and the prompt
// shorter than ContextTokens(limits).
struct SequenceSpec {
  uint64_t id = 0;  // the caller's; unique among sequences that have not ended, never 0
  std::vector<int32_t> prompt;
  step::SamplingParams sampling;
  uint64_t seed = 0;
  int32_t max_tokens = 1;
  int32_t min_tokens = 0;
  std::vector<int32_t> stop_ids;
  int32_t logprobs = -1;
  Deadline deadline = Deadline::max();
  Deadline queue_deadline = Deadline::max();  // for the first admission
  std::string tenant = {};                    // who asks; empty = nobody in particular
  Priority priority = Priority::kNormal;
  std::string prefix_salt = {};      // shares prefixes with those who have the same one
  bool bypass_prefix_cache = false;  // takes no cached prefix, and leaves none
};

struct FairShare;
struct PrefixOwner;

enum class SequenceState : uint8_t {
  kUnused,   // in the scheduler's store
  kWaiting,  // never admitted, or preempted
  kRunning,  // holds a slot and blocks
};

// Positions are 0 … prompt + outputs - 1; the last output is never fed. `fed`, `outputs_planned`
// and `steps_in_flight` run ahead of what is known: they count launched steps.
struct Sequence {
  uint64_t id = 0;
  uint64_t arrival = 0;        // rising
  uint64_t order = 0;          // of first admissions, rising: who is older once it has had a slot
  FairShare* share = nullptr;  // its tenant's
  Sequence* next_waiting = nullptr;  // of its share, while it waits for its first slot
  SequenceState state = SequenceState::kUnused;
  bool admitted_before = false;
  bool prefilling = false;  // since it got its slot, no row of it has been planned for sampling

  std::vector<int32_t> tokens;  // prompt, then outputs known so far
  int32_t prompt_count = 0;
  int32_t outputs_max = 0;  // max_tokens, or what the context leaves
  int32_t outputs_planned = 0;
  int32_t fed = 0;  // input positions launched
  int32_t steps_in_flight = 0;
  uint64_t last_step = 0;  // the last step launched with a row of it

  int32_t slot = -1;
  std::vector<int32_t> blocks;
  int32_t blocks_sent = 0;  // of those, how many the executor has been told
  int32_t preemptions = 0;

  PrefixOwner* prefix_owner = nullptr;  // none: it has nothing to do with the prefix cache
  std::vector<BlockName> names;  // of its blocks from the first on, as far as they were asked for
  int32_t cached = 0;            // positions that the last admission found cached
  int32_t published = 0;         // blocks whose contents the index has had since then
  int32_t published_block = -1;  // where it has the last of them, and the serial there
  uint64_t published_serial = 0;
  bool has_twins = false;  // some of these are another's blocks with the same contents

  step::SamplingParams sampling;
  uint64_t seed = 0;
  int32_t min_tokens = 0;
  std::vector<int32_t> stop_ids;
  int32_t logprobs = -1;
  Deadline deadline = Deadline::max();
  Deadline queue_deadline = Deadline::max();

  [[nodiscard]] int32_t token_count() const { return static_cast<int32_t>(tokens.size()); }
  [[nodiscard]] int32_t output_count() const { return token_count() - prompt_count; }
  // Every output that it may have is in a launched step: it ends once those retire.
  [[nodiscard]] bool AllPlanned() const { return outputs_planned == outputs_max; }
  [[nodiscard]] int32_t positions_max() const { return prompt_count + outputs_max - 1; }
  [[nodiscard]] bool IsStopId(int32_t token_id) const {
    return std::find(stop_ids.begin(), stop_ids.end(), token_id) != stop_ids.end();
  }
};

}  // namespace nibble::scheduling
