// A warmed-up executor does not allocate in a step, on any of its threads.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "tests/support/in_process_group.h"
#include "tests/support/test_data.h"

namespace {

std::atomic<int64_t> allocations{0};

void* Allocate(std::size_t bytes) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  void* memory = std::malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) std::abort();
  return memory;
}

}  // namespace

void* operator new(std::size_t bytes) { return Allocate(bytes); }
void* operator new[](std::size_t bytes) { return Allocate(bytes); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }

namespace nibble::execution {
namespace {

// Greedy, plain, filtered with penalties, and logprobs: one slot each.
step::SamplingParams ParamsOf(int32_t slot) {
  step::SamplingParams params;
  if (slot == 0) params.temperature = 0;
  if (slot == 2) {
    params.top_p = 0.9f;
    params.typical_p = 0.9f;
    params.top_k = 30;
    params.min_p = 0.01f;
    params.presence_penalty = 0.5f;
    params.logit_bias = {{.token_id = 3, .bias = 1}};
  }
  return params;
}

class AllocationTest : public ::testing::TestWithParam<std::tuple<int32_t, int32_t>> {};

TEST_P(AllocationTest, AWarmStepDoesNotAllocate) {
  const auto [ranks, threads] = GetParam();
  testing::InProcessGroup group(
      testing::SourceDir() + "/tests/data/model-specs/llama-awq-gemm",
      {.ranks = ranks,
       .memory = {.max_slots = 4, .max_step_tokens = 64, .max_context = 100},
       .threads = threads});
  const std::vector<int32_t> prompt(12, 5);
  for (int32_t slot = 0; slot < 4; ++slot) {
    group.Open(slot, prompt, ParamsOf(slot));
    group.Feed(slot, prompt, 1, slot == 3 ? 20 : -1);
  }
  static_cast<void>(group.Run());
  step::StepResult result;
  // Two steps in flight, as the engine keeps them; a plan that is built once.
  step::StepPlan plan;
  for (int32_t slot = 0; slot < 4; ++slot) {
    step::SequenceStep sequence;
    sequence.slot = slot;
    sequence.first_position = 12;
    sequence.token_begin = slot;
    sequence.token_count = 1;
    sequence.feed_sampled = true;
    sequence.block_table_index = 1;
    sequence.sample_count = 1;
    sequence.logprobs = slot == 3 ? 20 : -1;
    plan.sequences.push_back(sequence);
    plan.token_ids.push_back(-1);
  }
  const auto step = [&](int32_t position) {
    for (step::SequenceStep& sequence : plan.sequences) sequence.first_position = position;
    return group.group().Launch(plan).ok();
  };
  ASSERT_TRUE(step(12));
  ASSERT_TRUE(step(13));
  ASSERT_TRUE(group.group().Wait(Deadline::max(), &result).ok());
  ASSERT_TRUE(group.group().Wait(Deadline::max(), &result).ok());
  const int64_t before = allocations.load();
  ASSERT_TRUE(step(14));
  ASSERT_TRUE(step(15));
  ASSERT_TRUE(group.group().Wait(Deadline::max(), &result).ok());
  ASSERT_TRUE(group.group().Wait(Deadline::max(), &result).ok());
  EXPECT_EQ(allocations.load() - before, 0);
  EXPECT_EQ(result.tokens.size(), 4u);
}

INSTANTIATE_TEST_SUITE_P(Groups, AllocationTest,
                         ::testing::Values(std::tuple(1, 1), std::tuple(1, 2), std::tuple(2, 2)));

}  // namespace
}  // namespace nibble::execution
