// Plans for the tests of their wire form.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "worker/step/plan_codec.h"

namespace nibble::step {

template <typename Message>
std::vector<std::byte> Encoded(const Message& message) {
  std::vector<std::byte> bytes(EncodedSize(message));
  const absl::StatusOr<size_t> size = Encode(message, bytes);
  EXPECT_TRUE(size.ok()) << size.status();
  EXPECT_EQ(*size, bytes.size());
  return bytes;
}

// A plan that uses every field: two sequences (one prefill with its own masks, one decode), one
// slot opened with `history` tokens, one closed, one block copied.
inline StepPlan FullPlan(uint64_t step_id, int32_t history = 3) {
  StepPlan plan;
  plan.step_id = step_id;
  plan.closed = {4};
  SlotSetup setup;
  setup.slot = 1;
  setup.seed = 0x0123456789ABCDEF;
  setup.sampling = {.temperature = 0.5f,
                    .top_p = 0.9f,
                    .min_p = 0.1f,
                    .typical_p = 0.8f,
                    .top_k = 40,
                    .presence_penalty = 0.25f,
                    .frequency_penalty = -0.25f,
                    .repetition_penalty = 1.5f,
                    .logit_bias = {{.token_id = 7, .bias = -100}, {.token_id = 8, .bias = 1}}};
  setup.stop_ids = {2, 0};
  setup.min_tokens = 5;
  setup.prompt_count = history - 1;
  for (int32_t i = 0; i < history; ++i) setup.history.push_back(100 + i);
  plan.opened.push_back(setup);
  plan.block_copies = {{.from = 3, .to = 9}};
  plan.sequences.push_back({.slot = 1,
                            .first_position = 0,
                            .token_begin = 0,
                            .token_count = 3,
                            .feed_sampled = false,
                            .block_table_index = 0,
                            .block_begin = 0,
                            .block_count = 1,
                            .draft_count = 1,
                            .sample_count = 2,
                            .logprobs = 20,
                            .mask = MaskSource::kHere});
  plan.sequences.push_back({.slot = 2,
                            .first_position = 16,
                            .token_begin = 3,
                            .token_count = 1,
                            .feed_sampled = true,
                            .block_table_index = 1,
                            .block_begin = 1,
                            .block_count = 1,
                            .draft_count = 0,
                            .sample_count = 1,
                            .logprobs = -1,
                            .mask = MaskSource::kLate});
  plan.token_ids = {100, 101, 102, -1};
  plan.block_ids = {9, 10};
  plan.mask_stride = 2;
  plan.mask_words = {1, 2, 3, 0xFFFFFFFF};
  return plan;
}

// A decode step of `sequences` rows.
inline StepPlan DecodePlan(uint64_t step_id, int32_t sequences) {
  StepPlan plan;
  plan.step_id = step_id;
  for (int32_t i = 0; i < sequences; ++i) {
    plan.sequences.push_back({.slot = i,
                              .first_position = 5,
                              .token_begin = i,
                              .token_count = 1,
                              .feed_sampled = true,
                              .sample_count = 1});
    plan.token_ids.push_back(-1);
  }
  return plan;
}

}  // namespace nibble::step
