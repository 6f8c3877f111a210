// One scenario, run: the real engine and scheduler over the fake executor, on one thread and a
// clock that only the executor and the event list move. What must hold is checked after every turn
// of the engine's loop and once more at the end.
#pragma once

#include <cstdint>
#include <string>

#include "tests/sim/scenario.h"

namespace nibble::sim {

struct Outcome {
  std::string failure;  // the first thing that did not hold; empty when all did
  uint32_t trace = 0;   // checksum of every plan and every delivery, with their times
  uint64_t turns = 0;
  uint64_t steps = 0;
  uint64_t accepted = 0;
  uint64_t finished = 0;  // OK
  uint64_t tokens = 0;
  uint64_t preemptions = 0;
  uint64_t tokens_given_up = 0;
  uint64_t cached_tokens = 0;  // of prompts
  bool group_ended = false;
};

[[nodiscard]] Outcome RunScenario(const Scenario& scenario);

}  // namespace nibble::sim
