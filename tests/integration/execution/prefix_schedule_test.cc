// With cached prefixes a request has the tokens and log-probabilities that it has without, bit for
// bit: random schedules of requests whose prompts begin alike, in chunks, preempted and resumed,
// each compared with the same request alone and computed whole.
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "tests/integration/execution/smollm2.h"
#include "worker/execution/cpu/local_group.h"
#include "worker/scheduling/scheduler.h"

namespace nibble {
namespace {

using scheduling::Event;
using scheduling::EventKind;
using scheduling::Scheduler;
using scheduling::SchedulerOptions;
using scheduling::SequenceSpec;

int32_t Between(std::mt19937_64& random, int32_t low, int32_t high) {
  return low + static_cast<int32_t>(random() % static_cast<uint64_t>(high - low + 1));
}

struct Answer {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  int32_t cached = 0;
  int32_t preemptions = 0;
  friend bool SameOutput(const Answer& a, const Answer& b) {
    return a.tokens == b.tokens && a.logprobs == b.logprobs;
  }
};
using Answers = std::map<uint64_t, Answer>;

struct Arrival {
  int turn;
  SequenceSpec spec;
};

void TakeEvents(Scheduler* scheduler, Answers* answers) {
  for (const Event& event : scheduler->events()) {
    Answer& answer = (*answers)[event.id];
    if (event.kind == EventKind::kAdmitted) answer.cached = event.cached_tokens;
    if (event.kind == EventKind::kPreempted) ++answer.preemptions;
    if (event.kind != EventKind::kToken) continue;
    answer.tokens.push_back(event.token_id);
    answer.logprobs.push_back(event.logprob);
  }
  scheduler->ClearEvents();
}

// As the engine does it, one step ahead.
Answers Run(const SchedulerOptions& options, const std::vector<Arrival>& arrivals,
            step::Executor* executor) {
  Scheduler scheduler(options);
  Answers answers;
  step::StepPlan plan;
  step::StepResult result;
  size_t next = 0;
  for (int turn = 0;; ++turn) {
    for (; next < arrivals.size() && arrivals[next].turn <= turn; ++next) {
      scheduler.Add(arrivals[next].spec);
    }
    const auto planned = scheduler.Schedule(&plan);
    if (planned.has_value()) CHECK(executor->Launch(plan).ok());
    const int32_t in_flight = scheduler.in_flight();
    if (in_flight == 2 || (in_flight == 1 && !planned.has_value())) {
      CHECK(executor->Wait(Deadline::max(), &result).ok());
      CHECK(scheduler.Commit(result).ok());
    } else if (!planned.has_value() && next == arrivals.size()) {
      return answers;
    }
    TakeEvents(&scheduler, &answers);
    CHECK(scheduler.CheckInvariants().ok());
  }
}

SequenceSpec RandomSpec(std::mt19937_64& random, uint64_t id, int32_t vocab, int32_t prompt_max) {
  SequenceSpec spec;
  spec.id = id;
  spec.seed = random();
  const int32_t alike = Between(random, 0, prompt_max);
  for (int32_t i = Between(random, 1, prompt_max); i > 0; --i) {
    const auto at = static_cast<int32_t>(spec.prompt.size());
    spec.prompt.push_back(at < alike ? at * 7 % vocab : Between(random, 0, vocab - 1));
  }
  spec.max_tokens = Between(random, 1, 40);
  spec.logprobs = 0;
  spec.sampling.temperature = random() % 2 == 0 ? 0.0f : 0.9f;
  if (random() % 3 == 0) spec.sampling.frequency_penalty = 0.7f;
  spec.prefix_salt.assign(random() % 4 == 0 ? 1 : 0, 's');
  return spec;
}

struct Totals {
  int64_t cached = 0;
  int64_t preemptions = 0;
};

// `prompt_max` and outputs fit the context.
void ExpectNoDifference(step::Executor* executor, uint64_t seed, int requests, int32_t prompt_max,
                        Totals* totals) {
  std::mt19937_64 random(seed);
  SchedulerOptions options;
  options.limits = executor->limits();
  options.limits.kv_blocks = Between(random, prompt_max / 16 + 4, prompt_max / 16 + 8);
  options.limits.max_slots = Between(random, 1, options.limits.max_slots);
  options.prefill_chunk_tokens = Between(random, 5, 64);
  options.kv_watermark = 1.0;
  std::vector<Arrival> arrivals;
  int turn = 0;
  for (int i = 0; i < requests; ++i) {
    const auto id = static_cast<uint64_t>(i) + 1;
    arrivals.push_back({turn, RandomSpec(random, id, options.limits.vocab_size, prompt_max)});
    turn += Between(random, 0, 6);
  }
  const Answers together = Run(options, arrivals, executor);
  options.prefix.on = false;
  options.prefill_chunk_tokens = 512;
  for (const Arrival& arrival : arrivals) {
    const Answers alone = Run(options, {{0, arrival.spec}}, executor);
    const Answer& want = alone.at(arrival.spec.id);
    const Answer& got = together.at(arrival.spec.id);
    EXPECT_EQ(want.cached, 0);
    EXPECT_TRUE(SameOutput(got, want))
        << "seed " << seed << ", request " << arrival.spec.id << ", " << got.cached
        << " of its tokens cached, preempted " << got.preemptions << " times";
    totals->cached += got.cached;
    totals->preemptions += got.preemptions;
  }
}

std::unique_ptr<execution::LocalGroup> NewGroup(const weights::Checkpoint& checkpoint,
                                                int32_t ranks, weights::Numerics numerics,
                                                weights::HeadFormat head) {
  auto group = execution::LocalGroup::Create(checkpoint, {.ranks = ranks,
                                                          .memory = {.numerics = numerics,
                                                                     .head = head,
                                                                     .max_slots = 6,
                                                                     .max_step_tokens = 80,
                                                                     .max_context = 160,
                                                                     .kv_blocks = 60},
                                                          .threads = 2});
  CHECK_MSG(group.ok(), group.status().ToString());
  return *std::move(group);
}

TEST(PrefixScheduleTest, CachedPrefixesChangeNothing) {
  for (const char* model : {"llama", "mistral-window", "qwen3"}) {
    auto checkpoint =
        weights::Checkpoint::Open(testing::SourceDir() + "/tests/data/model-specs/" + model);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    Totals totals;
    for (const auto numerics : {weights::Numerics::kExact, weights::Numerics::kFast}) {
      const auto head = numerics == weights::Numerics::kExact ? weights::HeadFormat::kStored
                                                              : weights::HeadFormat::kInt8;
      const auto group = NewGroup(**checkpoint, 1, numerics, head);
      for (uint64_t seed = 0; seed < 10; ++seed) {
        ExpectNoDifference(group.get(), seed, 12, 100, &totals);
        ASSERT_FALSE(HasFailure()) << model;
      }
    }
    EXPECT_GT(totals.cached, 2000) << model;
    EXPECT_GT(totals.preemptions, 4) << model;
  }
}

TEST(PrefixScheduleTest, CachedPrefixesChangeNothingOnTwoRanks) {
  auto checkpoint =
      weights::Checkpoint::Open(testing::SourceDir() + "/tests/data/model-specs/llama-awq-gemm");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto group =
      NewGroup(**checkpoint, 2, weights::Numerics::kFast, weights::HeadFormat::kInt8);
  Totals totals;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    ExpectNoDifference(group.get(), seed, 8, 100, &totals);
  }
  EXPECT_GT(totals.cached, 0);
}

TEST(PrefixScheduleTest, CachedPrefixesChangeNothingInARealModel) {
  const weights::Checkpoint* checkpoint =
      testing::SmolCheckpoint("PrefixScheduleTest.CachedPrefixesChangeNothingInARealModel");
  if (checkpoint == nullptr) return;
  Totals totals;
  for (const auto numerics : {weights::Numerics::kExact, weights::Numerics::kFast}) {
    const auto head = numerics == weights::Numerics::kExact ? weights::HeadFormat::kStored
                                                            : weights::HeadFormat::kInt8;
    const auto group = NewGroup(*checkpoint, 1, numerics, head);
    for (uint64_t seed = 100; seed < 102; ++seed) {
      ExpectNoDifference(group.get(), seed, 8, 110, &totals);
    }
  }
  EXPECT_GT(totals.cached, 500);
  EXPECT_GT(totals.preemptions, 0);
}

}  // namespace
}  // namespace nibble
