#include "worker/execution/cuda/step_inputs.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "kernels/sampling/random.h"

namespace nibble::execution {
namespace {

using ::testing::ElementsAre;

constexpr step::ExecutorLimits kLimits{
    .vocab_size = 100, .max_context = 64, .max_slots = 4, .max_step_tokens = 40, .kv_blocks = 10};
// Tiles of five tokens.
constexpr StepInputs::Model kModel{.heads = 9, .kv_heads = 3};

// Slot 2 with 18 prompt tokens in blocks 9 and 3, its last row sampled.
step::StepPlan Prompt(const step::SamplingParams& sampling) {
  step::StepPlan plan;
  plan.opened.resize(1);
  plan.opened[0].slot = 2;
  plan.opened[0].seed = 5;
  plan.opened[0].sampling = sampling;
  plan.opened[0].history.assign(18, 7);
  plan.opened[0].prompt_count = 18;
  plan.token_ids.assign(18, 7);
  plan.block_ids = {9, 3};
  plan.sequences.resize(1);
  plan.sequences[0].slot = 2;
  plan.sequences[0].token_count = 18;
  plan.sequences[0].block_count = 2;
  plan.sequences[0].sample_count = 1;
  return plan;
}

// The step after: the sampled token.
step::StepPlan Next(int32_t position) {
  step::StepPlan plan;
  plan.token_ids = {-1};
  plan.sequences.resize(1);
  plan.sequences[0].slot = 2;
  plan.sequences[0].first_position = position;
  plan.sequences[0].token_count = 1;
  plan.sequences[0].feed_sampled = true;
  plan.sequences[0].sample_count = 1;
  return plan;
}

step::SamplingParams Greedy() { return {.temperature = 0}; }

// What Write put where the offsets say.
template <typename T>
std::vector<T> Part(const std::vector<std::byte>& memory, int64_t offset, int32_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  std::memcpy(values.data(), memory.data() + offset, values.size() * sizeof(T));
  return values;
}
std::vector<std::byte> Written(const StepInputs& inputs, const StepOffsets& offsets) {
  std::vector<std::byte> memory(static_cast<size_t>(offsets.bytes));
  inputs.Write(offsets, memory.data());
  return memory;
}

TEST(StepInputsTest, PromptIsCutIntoTilesOfItsSequence) {
  StepInputs inputs(kLimits, kModel);
  ASSERT_TRUE(inputs.Build(Prompt(Greedy())).ok());
  const StepShape shape = inputs.shape();
  EXPECT_EQ(shape.tokens, 18);
  EXPECT_EQ(shape.rows, 1);
  EXPECT_FALSE(inputs.decode_only());
  const StepOffsets offsets = OffsetsOf(shape);
  const auto memory = Written(inputs, offsets);
  EXPECT_EQ(shape.tiles, 4);
  EXPECT_EQ(shape.prompt_tiles, 0);
  const auto units = Part<cuda::AttentionUnit>(memory, offsets.units, UnitCapacity(shape.tiles));
  // The longest first: the last tile alone sees two KV blocks.
  EXPECT_EQ(units[0].first_row, 15);
  EXPECT_EQ(units[0].tokens, 3);
  EXPECT_EQ(units[0].first_position, 15);
  EXPECT_EQ(units[0].slot, 2);
  EXPECT_EQ(units[3].first_row, 10);
  EXPECT_EQ(units[4].tokens, 0);
  const auto blocks = Part<int32_t>(memory, offsets.blocks, shape.tokens);
  EXPECT_EQ(blocks[15], 9);
  EXPECT_EQ(blocks[16], 3);
  // Slot 2's table begins at 2 * 4.
  EXPECT_THAT(Part<int32_t>(memory, offsets.updates, 4), ElementsAre(8, 9, 9, 3));
  EXPECT_THAT(Part<int32_t>(memory, offsets.row_tokens, 1), ElementsAre(17));
}

TEST(StepInputsTest, LongPromptGoesToThePromptKernelLastTileFirst) {
  StepInputs::Model model = kModel;
  model.head_dim = 64;
  step::ExecutorLimits limits = kLimits;
  limits.max_context = 160;
  StepInputs inputs(limits, model);
  step::StepPlan plan = Prompt(Greedy());
  plan.sequences[0].token_count = 22;  // 66 rows
  plan.token_ids.assign(22, 7);
  ASSERT_TRUE(inputs.Build(plan).ok());
  EXPECT_EQ(inputs.shape().tiles, 0);
  EXPECT_EQ(inputs.shape().prompt_tiles, 1);
  plan.sequences[0].token_count = 43;  // a tile holds 42
  plan.token_ids.assign(43, 7);
  ASSERT_TRUE(inputs.Build(plan).ok());
  const StepShape shape = inputs.shape();
  const StepOffsets offsets = OffsetsOf(shape);
  const auto tiles =
      Part<cuda::AttentionTile>(Written(inputs, offsets), offsets.prompt_tiles, shape.prompt_tiles);
  ASSERT_EQ(tiles.size(), 2u);
  EXPECT_EQ(tiles[0].first_row, 42);
  EXPECT_EQ(tiles[0].tokens, 1);
  EXPECT_EQ(tiles[0].first_position, 42);
  EXPECT_EQ(tiles[1].tokens, 42);
  EXPECT_EQ(tiles[1].slot, 2);
}

TEST(StepInputsTest, SampledTokenIsFedFromItsSlot) {
  StepInputs inputs(kLimits, kModel);
  ASSERT_TRUE(inputs.Build(Prompt(Greedy())).ok());
  ASSERT_TRUE(inputs.Build(Next(18)).ok());
  EXPECT_TRUE(inputs.decode_only());
  const StepOffsets offsets = OffsetsOf(inputs.shape());
  const auto memory = Written(inputs, offsets);
  EXPECT_THAT(Part<int32_t>(memory, offsets.token_ids, 1), ElementsAre(-1 - 2));
  EXPECT_THAT(Part<int32_t>(memory, offsets.positions, 1), ElementsAre(18));
  EXPECT_THAT(Part<int32_t>(memory, offsets.blocks, 1), ElementsAre(3));
}

// After preemption the token sampled last stands in the history; the device has forgotten it.
TEST(StepInputsTest, FirstTokenAfterOpeningComesFromTheHistory) {
  StepInputs inputs(kLimits, kModel);
  step::StepPlan plan = Prompt(Greedy());
  plan.opened[0].history.push_back(42);
  plan.sequences[0].sample_count = 0;
  ASSERT_TRUE(inputs.Build(plan).ok());
  ASSERT_TRUE(inputs.Build(Next(18)).ok());
  const StepOffsets offsets = OffsetsOf(inputs.shape());
  EXPECT_THAT(Part<int32_t>(Written(inputs, offsets), offsets.token_ids, 1), ElementsAre(42));
}

TEST(StepInputsTest, RandomNumbersFollowSeedAndOutputIndex) {
  StepInputs inputs(kLimits, kModel);
  ASSERT_TRUE(inputs.Build(Prompt({.temperature = 0.5f})).ok());
  ASSERT_TRUE(inputs.Build(Next(18)).ok());
  const StepOffsets offsets = OffsetsOf(inputs.shape());
  const auto rows =
      Part<cuda::SampleRow>(Written(inputs, offsets), offsets.sample_rows, inputs.shape().rows);
  EXPECT_EQ(rows[0].stream, sampling::OutputStream(5, 1));
  EXPECT_EQ(rows[0].inverse_temperature, 2.0);
  EXPECT_EQ(rows[0].slot, 2);
}

TEST(StepInputsTest, WhatAsksForMoreThanItsBestTokenIsSampledElsewhere) {
  StepInputs inputs(kLimits, kModel);
  step::StepPlan plan = Prompt({.temperature = 0.5f, .top_p = 0.9f, .repetition_penalty = 1.1f});
  plan.opened[0].stop_ids = {3};
  plan.opened[0].min_tokens = 1;
  ASSERT_TRUE(inputs.Build(plan).ok());
  EXPECT_TRUE(inputs.rows()[0].whole);
  const StepOffsets offsets = OffsetsOf(inputs.shape());
  const auto memory = Written(inputs, offsets);
  EXPECT_EQ(Part<cuda::SampleRow>(memory, offsets.sample_rows, 1)[0].slot, kLimits.max_slots);
  const auto whole = Part<cuda::WholeRow>(memory, offsets.whole_rows, 1);
  EXPECT_EQ(whole[0].top_p, 0.9f);
  EXPECT_EQ(whole[0].stream, sampling::OutputStream(5, 0));
  EXPECT_THAT(Part<int32_t>(memory, offsets.ids, 1), ElementsAre(3));
  EXPECT_EQ(Part<cuda::SlotHistory>(memory, offsets.histories, 1)[0].count, 18);
  EXPECT_EQ(Part<int32_t>(memory, offsets.history_tokens, 18)[17], 7);
  ASSERT_TRUE(inputs.Build(Next(18)).ok());
  EXPECT_EQ(inputs.shape().whole.rows, 1);
  EXPECT_EQ(inputs.shape().whole.ids, 0);
  EXPECT_EQ(inputs.shape().whole.histories, 0);
}

TEST(StepInputsTest, PlainRowsStayWithTheStepsOwnSampler) {
  StepInputs inputs(kLimits, kModel);
  step::StepPlan plan = Prompt(Greedy());
  plan.opened[0].stop_ids = {3};
  plan.opened[0].min_tokens = 1;
  ASSERT_TRUE(inputs.Build(plan).ok());
  EXPECT_TRUE(inputs.rows()[0].whole);
  ASSERT_TRUE(inputs.Build(Next(18)).ok());
  EXPECT_FALSE(inputs.rows()[0].whole);
  EXPECT_EQ(inputs.shape().whole.rows, 0);
}

TEST(StepInputsTest, OutputsOfDraftsCountWhenTheyAreKnown) {
  StepInputs inputs(kLimits, kModel);
  step::StepPlan plan = Prompt({.temperature = 0.5f});
  plan.sequences[0].draft_count = 2;
  plan.sequences[0].sample_count = 3;
  ASSERT_TRUE(inputs.Build(plan).ok());
  EXPECT_EQ(inputs.whole_rows().lists().rows[2].stream, sampling::OutputStream(5, 2));
  inputs.TakeOutputs(2, 2);
  ASSERT_TRUE(inputs.Build(Next(18)).ok());
  const StepOffsets offsets = OffsetsOf(inputs.shape());
  EXPECT_EQ(Part<cuda::SampleRow>(Written(inputs, offsets), offsets.sample_rows, 1)[0].stream,
            sampling::OutputStream(5, 2));
}

TEST(StepInputsTest, PaddingUsesASlotAndABlockOfItsOwn) {
  StepInputs inputs(kLimits, kModel);
  ASSERT_TRUE(inputs.Build(Prompt(Greedy())).ok());
  ASSERT_TRUE(inputs.Build(Next(18)).ok());
  inputs.Pad(3);
  const StepShape shape = inputs.shape();
  EXPECT_EQ(shape.tokens, 3);
  EXPECT_EQ(shape.tiles, 3);
  EXPECT_EQ(shape.rows, 3);
  EXPECT_EQ(inputs.rows().size(), 1u);
  const StepOffsets offsets = OffsetsOf(shape);
  const auto memory = Written(inputs, offsets);
  EXPECT_THAT(Part<int32_t>(memory, offsets.blocks, 3), ElementsAre(3, 10, 10));
  EXPECT_EQ(Part<cuda::AttentionUnit>(memory, offsets.units, 3)[2].slot, 4);
  EXPECT_EQ(Part<cuda::SampleRow>(memory, offsets.sample_rows, 3)[1].slot, 4);
}

// A graph keeps the addresses of its inputs whatever else a step brings.
TEST(StepInputsTest, UpdatesAndCopiesLieBehindWhatGraphsRead) {
  const StepShape shape{.tokens = 5, .tiles = 5, .rows = 5};
  StepShape more = shape;
  more.table_updates = 7;
  more.copies = 2;
  const StepOffsets a = OffsetsOf(shape), b = OffsetsOf(more);
  EXPECT_EQ(a.units, b.units);
  EXPECT_EQ(a.sample_rows, b.sample_rows);
  EXPECT_EQ(a.row_tokens, b.row_tokens);
  EXPECT_EQ(b.updates, a.bytes);
  EXPECT_EQ(b.bytes, b.copies + 16);
}

}  // namespace
}  // namespace nibble::execution
