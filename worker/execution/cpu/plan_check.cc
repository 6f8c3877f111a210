#include "worker/execution/cpu/plan_check.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "worker/execution/cpu/row_sampler.h"

namespace nibble::execution {
namespace {

bool InRange(int64_t value, int64_t begin, int64_t end) { return value >= begin && value < end; }

// [begin, begin + count) lies within a list of `size`.
bool Within(int64_t begin, int64_t count, size_t size) {
  return begin >= 0 && count >= 0 && begin + count <= static_cast<int64_t>(size);
}

absl::Status Bad(const char* what, int64_t value, int64_t limit) {
  return absl::InvalidArgumentError(
      absl::StrCat("step plan: ", what, " is ", value, "; limit is ", limit));
}

}  // namespace

PlanChecker::PlanChecker(const step::ExecutorLimits& limits)
    : limits_(limits), slots_(static_cast<size_t>(limits.max_slots)) {}

absl::Status PlanChecker::Check(const step::StepPlan& plan) {
  ++checks_;
  RETURN_IF_ERROR(CheckSlots(plan));
  RETURN_IF_ERROR(CheckBlocks(plan));
  int64_t tokens = 0;
  for (const step::SequenceStep& sequence : plan.sequences) {
    RETURN_IF_ERROR(CheckSequence(plan, sequence));
    tokens += sequence.token_count;
  }
  if (tokens > limits_.max_step_tokens) {
    return Bad("the number of input tokens", tokens, limits_.max_step_tokens);
  }
  return CheckMasks(plan);
}

absl::Status PlanChecker::CheckSlots(const step::StepPlan& plan) {
  for (const int32_t slot : plan.closed) {
    if (!InRange(slot, 0, limits_.max_slots)) return Bad("a closed slot", slot, limits_.max_slots);
    slots_[static_cast<size_t>(slot)] = {};
  }
  for (const step::SlotSetup& setup : plan.opened) {
    RETURN_IF_ERROR(CheckSetup(setup));
    slots_[static_cast<size_t>(setup.slot)] = {.open = true, .has_token = !setup.history.empty()};
  }
  return absl::OkStatus();
}

absl::Status PlanChecker::CheckSetup(const step::SlotSetup& setup) {
  if (!InRange(setup.slot, 0, limits_.max_slots)) {
    return Bad("an opened slot", setup.slot, limits_.max_slots);
  }
  if (!InRange(setup.prompt_count, 0, static_cast<int64_t>(setup.history.size()) + 1)) {
    return Bad("prompt_count", setup.prompt_count, static_cast<int64_t>(setup.history.size()));
  }
  for (const int32_t token : setup.history) {
    if (!InRange(token, 0, limits_.vocab_size)) {
      return Bad("a token of a history", token, limits_.vocab_size);
    }
  }
  return absl::OkStatus();
}

absl::Status PlanChecker::CheckBlocks(const step::StepPlan& plan) {
  for (const int32_t block : plan.block_ids) {
    if (!InRange(block, 0, limits_.kv_blocks)) return Bad("a block id", block, limits_.kv_blocks);
  }
  for (const step::BlockCopy& copy : plan.block_copies) {
    if (!InRange(copy.from, 0, limits_.kv_blocks) || !InRange(copy.to, 0, limits_.kv_blocks)) {
      return Bad("a copied block", std::max(copy.from, copy.to), limits_.kv_blocks);
    }
  }
  return absl::OkStatus();
}

absl::Status PlanChecker::CheckSequence(const step::StepPlan& plan,
                                        const step::SequenceStep& sequence) {
  if (!InRange(sequence.slot, 0, limits_.max_slots)) {
    return Bad("a sequence's slot", sequence.slot, limits_.max_slots);
  }
  SlotState& slot = slots_[static_cast<size_t>(sequence.slot)];
  if (!slot.open || slot.last_check == checks_) {
    return absl::InvalidArgumentError(
        absl::StrCat("step plan: slot ", sequence.slot,
                     slot.open ? " has two sequences" : " has a sequence and is not open"));
  }
  slot.last_check = checks_;
  RETURN_IF_ERROR(CheckTokens(plan, sequence, slot.has_token));
  const int64_t end = int64_t{sequence.first_position} + sequence.token_count;
  if (sequence.first_position < 0 || end > limits_.max_context) {
    return Bad("the end of a sequence's positions", end, limits_.max_context);
  }
  if (!Within(sequence.block_begin, sequence.block_count, plan.block_ids.size()) ||
      !InRange(sequence.block_table_index, 0, int64_t{slot.blocks} + 1)) {
    return Bad("a block table's index", sequence.block_table_index, slot.blocks);
  }
  slot.blocks = std::max(slot.blocks, sequence.block_table_index + sequence.block_count);
  const int32_t table = (limits_.max_context + step::kBlockTokens - 1) / step::kBlockTokens;
  if (slot.blocks > table) return Bad("a block table's size", slot.blocks, table);
  if (end > int64_t{slot.blocks} * step::kBlockTokens) {
    return Bad("the end of a sequence's positions", end, int64_t{slot.blocks} * step::kBlockTokens);
  }
  slot.has_token = slot.has_token || sequence.sample_count > 0;
  return absl::OkStatus();
}

absl::Status PlanChecker::CheckTokens(const step::StepPlan& plan,
                                      const step::SequenceStep& sequence, bool has_token) {
  if (sequence.token_count < 1 ||
      !Within(sequence.token_begin, sequence.token_count, plan.token_ids.size())) {
    return Bad("a sequence's token count", sequence.token_count,
               static_cast<int64_t>(plan.token_ids.size()));
  }
  if (sequence.feed_sampled && !has_token) {
    return absl::InvalidArgumentError(
        absl::StrCat("step plan: slot ", sequence.slot, " has sampled no token to feed"));
  }
  for (int32_t i = sequence.feed_sampled ? 1 : 0; i < sequence.token_count; ++i) {
    const int32_t token = plan.token_ids[static_cast<size_t>(sequence.token_begin + i)];
    if (!InRange(token, 0, limits_.vocab_size)) {
      return Bad("an input token", token, limits_.vocab_size);
    }
  }
  if (!InRange(sequence.draft_count, 0, std::min(kDraftsMax + 1, sequence.token_count))) {
    return Bad("a sequence's draft count", sequence.draft_count, kDraftsMax);
  }
  if (sequence.sample_count != 0 && sequence.sample_count != 1 + sequence.draft_count) {
    return Bad("a sequence's sample count", sequence.sample_count, 1 + sequence.draft_count);
  }
  if (!InRange(sequence.logprobs, -1, step::kMaxLogprobs + 1)) {
    return Bad("a sequence's logprobs", sequence.logprobs, step::kMaxLogprobs);
  }
  return absl::OkStatus();
}

absl::Status PlanChecker::CheckMasks(const step::StepPlan& plan) const {
  int64_t rows = 0;
  for (const step::SequenceStep& sequence : plan.sequences) {
    if (sequence.mask == step::MaskSource::kHere) rows += sequence.sample_count;
  }
  if (rows == 0) return absl::OkStatus();
  if (plan.mask_stride < (limits_.vocab_size + 31) / 32) {
    return Bad("mask_stride", plan.mask_stride, (limits_.vocab_size + 31) / 32);
  }
  if (rows * plan.mask_stride > static_cast<int64_t>(plan.mask_words.size())) {
    return Bad("the number of mask words", static_cast<int64_t>(plan.mask_words.size()),
               rows * plan.mask_stride);
  }
  return absl::OkStatus();
}

}  // namespace nibble::execution
