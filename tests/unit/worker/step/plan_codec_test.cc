#include "worker/step/plan_codec.h"

#include <cstring>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "sample_plan.h"
#include "tests/support/allocation_count.h"

namespace nibble::step {
namespace {

using ::testing::HasSubstr;

absl::Status DecodePlanBytes(std::span<const std::byte> bytes) {
  StepPlan plan;
  return Decode(bytes, &plan);
}

// The plan after a change that makes it wrong must be refused, naming `part`.
void ExpectRefused(const StepPlan& plan, const char* part) {
  const absl::Status status = DecodePlanBytes(Encoded(plan));
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << part;
  EXPECT_THAT(status.message(), HasSubstr(part));
}

TEST(PlanCodecTest, KeepsEveryField) {
  const StepPlan plan = FullPlan(42);
  StepPlan copy = DecodePlan(1, 9);  // not empty, so that leftovers would show
  ASSERT_TRUE(Decode(Encoded(plan), &copy).ok());
  EXPECT_EQ(copy.step_id, 42u);
  EXPECT_EQ(copy.closed, plan.closed);
  ASSERT_EQ(copy.opened.size(), 1u);
  const SlotSetup& setup = copy.opened[0];
  EXPECT_EQ(setup.slot, 1);
  EXPECT_EQ(setup.seed, 0x0123456789ABCDEFu);
  EXPECT_EQ(setup.sampling.temperature, 0.5f);
  EXPECT_EQ(setup.sampling.top_p, 0.9f);
  EXPECT_EQ(setup.sampling.min_p, 0.1f);
  EXPECT_EQ(setup.sampling.typical_p, 0.8f);
  EXPECT_EQ(setup.sampling.top_k, 40);
  EXPECT_EQ(setup.sampling.presence_penalty, 0.25f);
  EXPECT_EQ(setup.sampling.frequency_penalty, -0.25f);
  EXPECT_EQ(setup.sampling.repetition_penalty, 1.5f);
  ASSERT_EQ(setup.sampling.logit_bias.size(), 2u);
  EXPECT_EQ(setup.sampling.logit_bias[1].token_id, 8);
  EXPECT_EQ(setup.sampling.logit_bias[0].bias, -100);
  EXPECT_EQ(setup.stop_ids, plan.opened[0].stop_ids);
  EXPECT_EQ(setup.min_tokens, 5);
  EXPECT_EQ(setup.history, plan.opened[0].history);
  EXPECT_EQ(setup.prompt_count, 2);
  ASSERT_EQ(copy.block_copies.size(), 1u);
  EXPECT_EQ(copy.block_copies[0].from, 3);
  EXPECT_EQ(copy.block_copies[0].to, 9);
  ASSERT_EQ(copy.sequences.size(), 2u);
  EXPECT_EQ(copy.sequences[0].draft_count, 1);
  EXPECT_EQ(copy.sequences[0].sample_count, 2);
  EXPECT_EQ(copy.sequences[0].logprobs, 20);
  EXPECT_EQ(copy.sequences[0].mask, MaskSource::kHere);
  EXPECT_EQ(copy.sequences[1].slot, 2);
  EXPECT_EQ(copy.sequences[1].first_position, 16);
  EXPECT_EQ(copy.sequences[1].token_begin, 3);
  EXPECT_EQ(copy.sequences[1].token_count, 1);
  EXPECT_TRUE(copy.sequences[1].feed_sampled);
  EXPECT_EQ(copy.sequences[1].block_table_index, 1);
  EXPECT_EQ(copy.sequences[1].block_begin, 1);
  EXPECT_EQ(copy.sequences[1].block_count, 1);
  EXPECT_EQ(copy.sequences[1].mask, MaskSource::kLate);
  EXPECT_EQ(copy.token_ids, plan.token_ids);
  EXPECT_EQ(copy.block_ids, plan.block_ids);
  EXPECT_EQ(copy.mask_words, plan.mask_words);
  EXPECT_EQ(copy.mask_stride, 2);
}

TEST(PlanCodecTest, KeepsMasks) {
  const MaskBatch masks = {.step_id = 9, .mask_words = {1, 2, 3, 4, 5, 6}, .mask_stride = 3};
  MaskBatch copy;
  ASSERT_TRUE(Decode(Encoded(masks), &copy).ok());
  EXPECT_EQ(copy.step_id, 9u);
  EXPECT_EQ(copy.mask_words, masks.mask_words);
  EXPECT_EQ(copy.mask_stride, 3);
}

TEST(PlanCodecTest, RefusesEveryTruncationAndEveryTail) {
  const std::vector<std::byte> plan = Encoded(FullPlan(1));
  const std::vector<std::byte> masks =
      Encoded(MaskBatch{.step_id = 9, .mask_words = {1, 2}, .mask_stride = 1});
  for (size_t size = 0; size < plan.size(); ++size) {
    EXPECT_FALSE(DecodePlanBytes(std::span(plan).first(size)).ok()) << size;
  }
  MaskBatch out;
  for (size_t size = 0; size < masks.size(); ++size) {
    EXPECT_FALSE(Decode(std::span(masks).first(size), &out).ok()) << size;
  }
  std::vector<std::byte> longer = plan;
  longer.push_back({});
  EXPECT_THAT(DecodePlanBytes(longer).message(), HasSubstr("longer"));
  EXPECT_FALSE(Decode(plan, &out).ok());
  EXPECT_FALSE(DecodePlanBytes(masks).ok());
}

// Whatever is accepted is the one wire form of what it says; nothing reads out of bounds.
TEST(PlanCodecTest, AcceptsOnlyTheOneWireForm) {
  const std::vector<std::byte> good = Encoded(FullPlan(1));
  int accepted = 0;
  const auto check = [&](std::span<const std::byte> bytes) {
    StepPlan plan;
    if (!Decode(bytes, &plan).ok()) return;
    ++accepted;
    const std::vector<std::byte> again = Encoded(plan);
    ASSERT_EQ(again.size(), bytes.size());
    EXPECT_EQ(std::memcmp(again.data(), bytes.data(), bytes.size()), 0);
  };
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::vector<std::byte> bytes = good;
    bytes[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
    check(bytes);
  }
  std::mt19937 random(7);
  for (int i = 0; i < 20000; ++i) {
    std::vector<std::byte> bytes = good;
    for (int change = 0; change < 4; ++change) {
      const size_t word = random() % (bytes.size() / 4) * 4;
      const auto low = static_cast<uint32_t>(random() % 64);
      const uint32_t values[] = {0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, low};
      const uint32_t value = values[random() % 6];
      std::memcpy(bytes.data() + word, &value, 4);
    }
    check(bytes);
  }
  EXPECT_GT(accepted, 0);
}

TEST(PlanCodecTest, RefusesReferencesOutsideThePlan) {
  const auto with = [](auto change) {
    StepPlan plan = FullPlan(1);
    change(plan);
    return plan;
  };
  ExpectRefused(with([](StepPlan& p) { p.sequences[1].token_begin = 4; }), "tokens");
  ExpectRefused(with([](StepPlan& p) { p.sequences[1].token_begin = -1; }), "tokens");
  ExpectRefused(with([](StepPlan& p) { p.sequences[0].token_count = 5; }), "tokens");
  ExpectRefused(with([](StepPlan& p) { p.sequences[1].token_count = 0; }), "tokens");
  ExpectRefused(with([](StepPlan& p) { p.sequences[1].block_begin = 2; }), "blocks");
  ExpectRefused(with([](StepPlan& p) { p.sequences[1].block_count = -1; }), "blocks");
  ExpectRefused(with([](StepPlan& p) { p.sequences[1].block_table_index = 0x7FFFFFFF; }), "blocks");
  ExpectRefused(with([](StepPlan& p) { p.sequences[1].first_position = 0x7FFFFFFF; }), "position");
  ExpectRefused(with([](StepPlan& p) { p.sequences[1].first_position = -1; }), "position");
  ExpectRefused(with([](StepPlan& p) { p.sequences[1].slot = -1; }), "slot");
  ExpectRefused(with([](StepPlan& p) { p.sequences[1].draft_count = 1; }), "drafts");
  ExpectRefused(with([](StepPlan& p) { p.sequences[0].sample_count = 1; }), "rows");
  ExpectRefused(with([](StepPlan& p) { p.sequences[0].logprobs = 21; }), "logprobs");
  ExpectRefused(with([](StepPlan& p) { p.sequences[1].mask = static_cast<MaskSource>(3); }),
                "mask source");
  ExpectRefused(with([](StepPlan& p) { p.mask_words.pop_back(); }), "mask words");
  ExpectRefused(with([](StepPlan& p) { p.mask_stride = -2; }), "mask words");
  ExpectRefused(with([](StepPlan& p) { p.closed[0] = -1; }), "closed");
  ExpectRefused(with([](StepPlan& p) { p.opened[0].slot = -1; }), "opened");
  ExpectRefused(with([](StepPlan& p) { p.opened[0].prompt_count = 4; }), "prompt count");
  ExpectRefused(with([](StepPlan& p) { p.block_copies[0].to = -1; }), "block copies");
  ExpectRefused(with([](StepPlan& p) { p.block_ids[0] = -5; }), "block ids");
}

TEST(PlanCodecTest, SaysWhenThereIsNoRoom) {
  const StepPlan plan = FullPlan(3);
  std::vector<std::byte> bytes(EncodedSize(plan) - 1);
  const absl::StatusOr<size_t> size = Encode(plan, bytes);
  EXPECT_EQ(size.status().code(), absl::StatusCode::kResourceExhausted);
}

TEST(PlanCodecTest, AllocatesNothingOnceWarm) {
  const StepPlan plan = DecodePlan(1, 64);
  std::vector<std::byte> bytes(EncodedSize(plan));
  StepPlan copy;
  ASSERT_TRUE(Encode(plan, bytes).ok());
  ASSERT_TRUE(Decode(bytes, &copy).ok());
  const size_t before = nibble::testing::AllocationCount();
  bool ok = true;
  for (int i = 0; i < 100; ++i) ok = ok && Encode(plan, bytes).ok() && Decode(bytes, &copy).ok();
  EXPECT_EQ(nibble::testing::AllocationCount(), before);
  EXPECT_TRUE(ok);
}

}  // namespace
}  // namespace nibble::step
