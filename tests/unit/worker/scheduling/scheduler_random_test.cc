// Random work on small pools against the fake executor, every invariant after every turn.
#include <random>

#include "gtest/gtest.h"
#include "scheduler_bench.h"

namespace nibble::scheduling {
namespace {

int32_t Between(std::mt19937_64& random, int32_t low, int32_t high) {
  return low + static_cast<int32_t>(random() % static_cast<uint64_t>(high - low + 1));
}

SchedulerOptions RandomOptions(std::mt19937_64& random) {
  SchedulerOptions options;
  options.limits = {.vocab_size = 50,
                    .max_context = Between(random, 20, 200),
                    .max_slots = Between(random, 1, 6),
                    .max_step_tokens = Between(random, 1, 64),
                    .kv_blocks = Between(random, 4, 24)};
  options.prefill_chunk_tokens = Between(random, 1, 64);
  options.kv_watermark = 0.1 * Between(random, 3, 10);
  options.preemptions_max = Between(random, 0, 4);
  options.prefix.on = random() % 8 != 0;
  options.prefix.owner_share = 0.1 * Between(random, 1, 10);
  return options;
}

SequenceSpec RandomSpec(std::mt19937_64& random, uint64_t id, int32_t context) {
  SequenceSpec spec = Spec(id, Between(random, 1, context - 1), Between(random, 1, context));
  spec.seed = random();
  // Prompts begin alike, up to a random place.
  for (auto i = static_cast<size_t>(Between(random, 0, 3 * context)); i < spec.prompt.size(); ++i) {
    spec.prompt[i] = Between(random, 0, 49);
  }
  spec.prefix_salt.assign(random() % 3, 'x');
  spec.bypass_prefix_cache = random() % 8 == 0;
  if (random() % 2 == 0) spec.stop_ids = {Between(random, 0, 49)};
  spec.min_tokens = Between(random, 0, 3);
  spec.logprobs = Between(random, -1, 2);
  if (random() % 4 == 0) spec.deadline = Deadline(Duration(Between(random, 0, 200)));
  if (random() % 4 == 0) spec.queue_deadline = Deadline(Duration(Between(random, 0, 200)));
  return spec;
}

void CheckOne(const SchedulerOptions& options, const SequenceSpec& spec, const Outcome& outcome) {
  ASSERT_TRUE(outcome.ended) << spec.id;
  ASSERT_EQ(outcome.tokens, ExpectedTokens(spec, outcome.output_count, 50)) << spec.id;
  ASSERT_LE(outcome.output_count, spec.max_tokens);
  ASSERT_LE(outcome.preemptions, options.preemptions_max);
  if (outcome.reason == EndReason::kStop) {
    ASSERT_EQ(outcome.tokens.back(), spec.stop_ids[0]);
    ASSERT_GT(outcome.output_count, spec.min_tokens);
  }
}

// How many positions the tokens of both have in common from the first one on.
int32_t CommonTokens(const SequenceSpec& a, std::vector<int32_t> b, const Outcome& b_outcome) {
  b.insert(b.end(), b_outcome.tokens.begin(), b_outcome.tokens.end());
  const auto end = std::mismatch(a.prompt.begin(), a.prompt.end(), b.begin(), b.end()).first;
  return static_cast<int32_t>(end - a.prompt.begin());
}

// What was cached for it must have been another's with the same salt.
void CheckCached(const std::map<uint64_t, SequenceSpec>& specs, const SequenceSpec& spec,
                 SchedulerBench* bench) {
  const int32_t cached = (*bench)[spec.id].cached_tokens;
  ASSERT_LT(cached, static_cast<int32_t>(spec.prompt.size()));
  ASSERT_EQ(cached % step::kBlockTokens, 0);
  if (cached == 0) return;
  ASSERT_FALSE(spec.bypass_prefix_cache);
  int32_t most = 0;
  for (const auto& [id, other] : specs) {
    if (id == spec.id || other.prefix_salt != spec.prefix_salt) continue;
    if (other.bypass_prefix_cache || !(*bench)[id].admitted) continue;
    most = std::max(most, CommonTokens(spec, other.prompt, (*bench)[id]));
  }
  ASSERT_LE(cached, most);
}

// Tokens of prompts that were cached.
int64_t RunSeed(uint64_t seed) {
  std::mt19937_64 random(seed);
  const SchedulerOptions options = RandomOptions(random);
  const int32_t context = ContextTokens(options.limits);
  testing::FakeFaults faults;
  const bool broken = seed % 4 == 0;
  if (broken) {
    faults.non_finite = [seed](uint64_t step_id, int32_t slot) {
      return testing::FakeToken(seed + step_id, slot, 60) == 0;
    };
  }
  SchedulerBench bench(options, faults);
  std::map<uint64_t, SequenceSpec> specs;
  const int turns = Between(random, 10, 150);
  for (int turn = 0; turn < turns; ++turn) {
    if (random() % 3 == 0) {
      const uint64_t id = specs.size() + 1;
      specs[id] = RandomSpec(random, id, context);
      bench.scheduler().Add(specs[id]);
    }
    if (random() % 8 == 0 && !specs.empty()) bench.scheduler().Cancel(1 + random() % specs.size());
    bench.scheduler().Expire(Deadline(Duration(turn)));
    bench.TakeEvents();
    bench.Turn();
  }
  bench.RunToEnd();
  int64_t cached = 0;
  for (const auto& [id, spec] : specs) {
    CheckOne(options, spec, bench[id]);
    CheckCached(specs, spec, &bench);
    cached += bench[id].cached_tokens;
    EXPECT_TRUE(broken || bench[id].reason != EndReason::kNonFinite);
  }
  return cached;
}

TEST(SchedulerRandomTest, EverythingEndsAndNothingIsLost) {
  int64_t cached = 0;
  for (uint64_t seed = 0; seed < 400; ++seed) {
    cached += RunSeed(seed);
    ASSERT_FALSE(::testing::Test::HasFailure()) << "seed " << seed;
  }
  EXPECT_GT(cached, 20000);  // otherwise prefixes were not tried
}

}  // namespace
}  // namespace nibble::scheduling
