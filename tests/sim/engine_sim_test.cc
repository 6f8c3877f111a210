// Seeded simulation of the engine. NIBBLE_SIM_SEEDS says how many seeds to run, NIBBLE_SIM_FIRST
// where to begin: a seed that failed is run again alone by NIBBLE_SIM_FIRST=<seed>
// NIBBLE_SIM_SEEDS=1.
#include <cinttypes>
#include <cstdio>
#include <cstdlib>

#include "gtest/gtest.h"
#include "tests/sim/world.h"

namespace nibble::sim {
namespace {

// A sanitizer makes a seed some ten times slower.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kSeeds = 200;
#else
constexpr uint64_t kSeeds = 2000;
#endif

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

TEST(EngineSimTest, EverySeedKeepsEveryPromise) {
  const uint64_t first = FromEnvironment("NIBBLE_SIM_FIRST", 1);
  const uint64_t count = FromEnvironment("NIBBLE_SIM_SEEDS", kSeeds);
  Outcome sum;
  uint64_t groups_ended = 0;
  uint64_t most_turns = 0;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    const Outcome outcome = RunScenario(MakeScenario(seed));
    ASSERT_EQ(outcome.failure, "")
        << "seed " << seed << ": run it alone with NIBBLE_SIM_FIRST=" << seed
        << " NIBBLE_SIM_SEEDS=1";
    sum.steps += outcome.steps;
    sum.accepted += outcome.accepted;
    sum.finished += outcome.finished;
    sum.tokens += outcome.tokens;
    sum.preemptions += outcome.preemptions;
    sum.cached_tokens += outcome.cached_tokens;
    groups_ended += outcome.group_ended ? 1 : 0;
    most_turns = std::max(most_turns, outcome.turns);
  }
  std::printf("%" PRIu64 " seeds from %" PRIu64 ": %" PRIu64 " requests, %" PRIu64
              " to their end, %" PRIu64 " tokens, %" PRIu64 " steps (%" PRIu64
              " turns at most), %" PRIu64 " preemptions, %" PRIu64 " cached tokens, %" PRIu64
              " groups ended by a fault\n",
              count, first, sum.accepted, sum.finished, sum.tokens, sum.steps, most_turns,
              sum.preemptions, sum.cached_tokens, groups_ended);
  // The scenarios are worth something only if these happen.
  if (count < 100) return;
  EXPECT_GT(sum.finished, count);
  EXPECT_GT(sum.preemptions, count / 2);
  EXPECT_GT(sum.cached_tokens, count);
  EXPECT_GT(groups_ended, 0u);
}

TEST(EngineSimTest, ASeedReplaysByteForByte) {
  const uint64_t first = FromEnvironment("NIBBLE_SIM_FIRST", 1);
  uint32_t previous = 0;
  for (uint64_t seed = first; seed < first + 50; ++seed) {
    const Outcome once = RunScenario(MakeScenario(seed));
    const Outcome again = RunScenario(MakeScenario(seed));
    EXPECT_EQ(once.trace, again.trace) << "seed " << seed;
    EXPECT_EQ(once.turns, again.turns) << "seed " << seed;
    EXPECT_NE(once.trace, previous) << "seed " << seed;  // a trace that says something
    previous = once.trace;
  }
}

}  // namespace
}  // namespace nibble::sim
