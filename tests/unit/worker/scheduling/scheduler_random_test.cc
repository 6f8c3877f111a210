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
  return options;
}

SequenceSpec RandomSpec(std::mt19937_64& random, uint64_t id, int32_t context) {
  SequenceSpec spec = Spec(id, Between(random, 1, context - 1), Between(random, 1, context));
  spec.seed = random();
  if (random() % 2 == 0) spec.stop_ids = {Between(random, 0, 49)};
  spec.min_tokens = Between(random, 0, 3);
  spec.logprobs = Between(random, -1, 2);
  if (random() % 4 == 0) spec.deadline = Deadline(Duration(Between(random, 0, 200)));
  if (random() % 4 == 0) spec.queue_deadline = Deadline(Duration(Between(random, 0, 200)));
  return spec;
}

void RunSeed(uint64_t seed) {
  std::mt19937_64 random(seed);
  const SchedulerOptions options = RandomOptions(random);
  const int32_t context = ContextTokens(options.limits);
  SchedulerBench bench(options);
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
  for (const auto& [id, spec] : specs) {
    ASSERT_TRUE(bench[id].ended) << id;
    ASSERT_EQ(bench[id].tokens, ExpectedTokens(spec, bench[id].output_count, 50)) << id;
    ASSERT_LE(bench[id].output_count, spec.max_tokens);
    ASSERT_LE(bench[id].preemptions, options.preemptions_max);
    if (bench[id].reason == EndReason::kStop) {
      ASSERT_EQ(bench[id].tokens.back(), spec.stop_ids[0]);
      ASSERT_GT(bench[id].output_count, spec.min_tokens);
    }
  }
}

TEST(SchedulerRandomTest, EverythingEndsAndNothingIsLost) {
  for (uint64_t seed = 0; seed < 400; ++seed) {
    RunSeed(seed);
    ASSERT_FALSE(::testing::Test::HasFailure()) << "seed " << seed;
  }
}

}  // namespace
}  // namespace nibble::scheduling
