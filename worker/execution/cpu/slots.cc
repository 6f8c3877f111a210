#include "worker/execution/cpu/slots.h"

#include <algorithm>

#include "base/check.h"

namespace nibble::execution {
namespace {

constexpr int32_t kPieceTokens = 16;

int32_t TableSize(const step::ExecutorLimits& limits) {
  return (limits.max_context + step::kBlockTokens - 1) / step::kBlockTokens;
}

}  // namespace

SlotTable::SlotTable(const step::ExecutorLimits& limits)
    : table_size_(TableSize(limits)),
      slots_(static_cast<size_t>(limits.max_slots)),
      block_tables_(int64_t{limits.max_slots} * table_size_ * int64_t{sizeof(int32_t)}),
      penalties_(limits.max_slots, limits.vocab_size),
      penalties_bytes_(PenaltyCounts::Bytes(limits.max_slots, limits.vocab_size)) {}

void SlotTable::Open(const step::SlotSetup& setup) {
  Slot& slot = slots_[static_cast<size_t>(setup.slot)];
  slot.seed = setup.seed;
  slot.params = setup.sampling;
  slot.stop_ids = setup.stop_ids;
  slot.min_tokens = setup.min_tokens;
  slot.outputs = static_cast<int32_t>(setup.history.size()) - setup.prompt_count;
  slot.last_token = setup.history.empty() ? 0 : setup.history.back();
  slot.penalized = UsesPenalties(setup.sampling);
  if (slot.penalized) penalties_.Reset(setup.slot, setup.history, setup.prompt_count);
}

void SlotTable::AddOutput(int32_t index, int32_t token_id) {
  Slot& slot = slots_[static_cast<size_t>(index)];
  slot.last_token = token_id;
  ++slot.outputs;
  if (slot.penalized) penalties_.AddOutput(index, token_id);
}

void SlotTable::SetBlocks(int32_t slot, int32_t index, std::span<const int32_t> blocks) {
  CHECK(index >= 0 && index + static_cast<int32_t>(blocks.size()) <= table_size_);
  std::copy(blocks.begin(), blocks.end(),
            block_tables_.as<int32_t>() + static_cast<int64_t>(slot) * table_size_ + index);
}

void StepRows::Reserve(const step::ExecutorLimits& limits, const Layout& layout) {
  const auto tokens = static_cast<size_t>(limits.max_step_tokens);
  inputs.reserve(tokens);
  sampled.reserve(tokens);
  // By KV head at most one piece a token; split by query head only while there are few.
  pieces.reserve(tokens * static_cast<size_t>(layout.kv_heads) +
                 static_cast<size_t>(4 * layout.threads * layout.heads));
}

void StepRows::Build(const step::StepPlan& plan, const SlotTable& slots, const Layout& layout) {
  inputs.clear();
  sampled.clear();
  late_rows = 0;
  const uint32_t* mask = plan.mask_words.data();
  for (size_t index = 0; index < plan.sequences.size(); ++index) {
    const step::SequenceStep& sequence = plan.sequences[index];
    const int32_t* table = slots.block_table(sequence.slot);
    const auto first_row = static_cast<int32_t>(inputs.size());
    for (int32_t i = 0; i < sequence.token_count; ++i) {
      const int32_t position = sequence.first_position + i;
      inputs.push_back({.token_id = plan.token_ids[static_cast<size_t>(sequence.token_begin + i)],
                        .position = position,
                        .block = table[position / step::kBlockTokens]});
    }
    if (sequence.feed_sampled) {
      inputs[static_cast<size_t>(first_row)].token_id = slots.slot(sequence.slot).last_token;
    }
    for (int32_t draft = 0; draft < sequence.sample_count; ++draft) {
      SampledRow row{.row = first_row + sequence.token_count - sequence.sample_count + draft,
                     .sequence = static_cast<int32_t>(index),
                     .draft = draft};
      if (sequence.mask == step::MaskSource::kHere) {
        row.mask = mask;
        mask += plan.mask_stride;
      }
      row.late_mask = sequence.mask == step::MaskSource::kLate;
      if (row.late_mask) ++late_rows;
      sampled.push_back(row);
    }
  }
  AddPieces(plan, layout);
}

// Pieces share the reading of one KV head among its query heads, unless there would be too few of
// them to keep the threads busy.
void StepRows::AddPieces(const step::StepPlan& plan, const Layout& layout) {
  pieces.clear();
  int64_t by_kv_head = 0;
  for (const step::SequenceStep& sequence : plan.sequences) {
    by_kv_head +=
        int64_t{layout.kv_heads} * ((sequence.token_count + kPieceTokens - 1) / kPieceTokens);
  }
  const int32_t ratio = layout.heads / layout.kv_heads;
  const bool few = layout.threads > 1 && by_kv_head < 4 * layout.threads;
  const int32_t heads = few ? 1 : ratio;  // of one piece
  int32_t first_row = 0;
  for (size_t index = 0; index < plan.sequences.size(); ++index) {
    const int32_t tokens = plan.sequences[index].token_count;
    // The last tokens see the most positions: the dearest pieces come first.
    for (int32_t end = tokens; end > 0; end -= std::min(end, kPieceTokens)) {
      for (int32_t head = 0; head < layout.heads; head += heads) {
        pieces.push_back({.sequence = static_cast<int32_t>(index),
                          .first_row = first_row,
                          .token_begin = std::max(0, end - kPieceTokens),
                          .token_end = end,
                          .head_begin = head,
                          .head_end = head + heads});
      }
    }
    first_row += tokens;
  }
}

}  // namespace nibble::execution
