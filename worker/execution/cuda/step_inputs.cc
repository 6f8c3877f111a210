#include "worker/execution/cuda/step_inputs.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "base/check.h"
#include "base/status.h"

namespace nibble::execution {
namespace {

constexpr int64_t kAlignment = 16;
// Rows of attention from which on a sequence's tokens are worth tiles of the prompt kernel.
constexpr int32_t kPromptRows = 4 * cuda::kAttentionRows + 1;

template <typename T>
int64_t Place(int32_t count, int64_t* end) {
  const int64_t at = *end;
  const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
  *end = at + (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return at;
}

template <typename T>
void Copy(const std::vector<T>& from, std::byte* to) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(T));
}

}  // namespace

StepOffsets OffsetsOf(const StepShape& shape) {
  StepOffsets offsets;
  int64_t end = 0;
  offsets.token_ids = Place<int32_t>(shape.tokens, &end);
  offsets.positions = Place<int32_t>(shape.tokens, &end);
  offsets.blocks = Place<int32_t>(shape.tokens, &end);
  offsets.units = Place<cuda::AttentionUnit>(UnitCapacity(shape.tiles), &end);
  offsets.sample_rows = Place<cuda::SampleRow>(shape.rows, &end);
  offsets.row_tokens = Place<int32_t>(shape.rows, &end);
  offsets.updates = Place<int32_t>(2 * shape.table_updates, &end);
  offsets.copies = Place<int32_t>(2 * shape.copies, &end);
  offsets.prompt_tiles = Place<cuda::AttentionTile>(shape.prompt_tiles, &end);
  offsets.whole_rows = Place<cuda::WholeRow>(shape.whole.rows, &end);
  offsets.biases = Place<cuda::TokenBias>(shape.whole.biases, &end);
  offsets.ids = Place<int32_t>(shape.whole.ids, &end);
  offsets.mask_words = Place<uint32_t>(shape.whole.mask_words, &end);
  offsets.histories = Place<cuda::SlotHistory>(shape.whole.histories, &end);
  offsets.history_tokens = Place<int32_t>(shape.whole.history_tokens, &end);
  offsets.drafted = Place<cuda::DraftedSequence>(shape.whole.drafted, &end);
  offsets.bytes = end;
  return offsets;
}

int32_t UnitCapacity(int32_t tiles) {
  return tiles == 0 ? 0 : tiles + cuda::kAttentionUnitsExtraMax;
}

StepInputs::StepInputs(const step::ExecutorLimits& limits, const Model& model)
    : limits_(limits),
      model_(model),
      table_size_((limits.max_context + step::kBlockTokens - 1) / step::kBlockTokens),
      slots_(static_cast<size_t>(limits.max_slots)),
      tables_((static_cast<size_t>(limits.max_slots) + 1) * static_cast<size_t>(table_size_), 0),
      whole_rows_(limits) {
  const auto tokens = static_cast<size_t>(limits.max_step_tokens);
  for (std::vector<int32_t>* list : {&token_ids_, &positions_, &blocks_, &row_tokens_}) {
    list->reserve(tokens);
  }
  tiles_.reserve(tokens + slots_.size());
  prompt_tiles_.reserve(tokens);
  units_.reserve(static_cast<size_t>(UnitCapacity(limits.max_step_tokens + limits.max_slots)));
  sample_rows_.reserve(tokens);
  rows_.reserve(tokens);
  updates_.reserve(2 * (tokens + 2 * slots_.size()));
  copies_.reserve(2 * slots_.size());
}

int64_t StepInputs::bytes_max() const {
  // A plan may set every entry of every table, and copy every block.
  return OffsetsOf({.tokens = limits_.max_step_tokens + limits_.max_slots,
                    .tiles = limits_.max_step_tokens + limits_.max_slots,
                    .prompt_tiles = limits_.max_step_tokens,
                    .rows = limits_.max_step_tokens + limits_.max_slots,
                    .table_updates = limits_.max_slots * table_size_,
                    .copies = limits_.kv_blocks,
                    .whole = WholeRows::LargestShape(limits_)})
             .bytes +
         kAlignment;  // masks and histories share their room
}

absl::Status StepInputs::Open(const step::SlotSetup& setup) {
  Slot& slot = slots_[static_cast<size_t>(setup.slot)];
  slot.outputs = static_cast<int64_t>(setup.history.size()) - setup.prompt_count;
  slot.last_of_history = setup.history.empty() ? 0 : setup.history.back();
  slot.sampled = false;
  return whole_rows_.Open(setup);
}

absl::Status StepInputs::Build(const step::StepPlan& plan) {
  for (auto* list : {&token_ids_, &positions_, &blocks_, &row_tokens_, &updates_, &copies_}) {
    list->clear();
  }
  tiles_.clear();
  prompt_tiles_.clear();
  sample_rows_.clear();
  rows_.clear();
  whole_rows_.Clear();
  decode_only_ = !plan.sequences.empty();
  longest_ = 0;
  for (const step::SlotSetup& setup : plan.opened) RETURN_IF_ERROR(Open(setup));
  for (const step::BlockCopy& copy : plan.block_copies) {
    copies_.push_back(copy.from);
    copies_.push_back(copy.to);
  }
  for (size_t i = 0; i < plan.sequences.size(); ++i) {
    const step::SequenceStep& sequence = plan.sequences[i];
    AddBlocks(plan, sequence);
    AddTokens(plan, sequence);
    AddRows(plan, static_cast<int32_t>(i));
    decode_only_ = decode_only_ && sequence.token_count == 1 && sequence.sample_count == 1;
    longest_ = std::max(longest_, sequence.first_position + sequence.token_count);
  }
  // Longest first: what is left at the end is short.
  std::sort(prompt_tiles_.begin(), prompt_tiles_.end(),
            [](const cuda::AttentionTile& a, const cuda::AttentionTile& b) {
              return std::tuple(b.first_position, a.first_row) <
                     std::tuple(a.first_position, b.first_row);
            });
  PlanUnits();
  return whole_rows_.CheckSizes();
}

void StepInputs::PlanUnits() {
  const auto tiles = static_cast<int32_t>(tiles_.size());
  cuda::PlanAttention(tiles_,
                      {.kv_heads = model_.kv_heads,
                       .blocks = cuda::AttentionBlocks(tiles, cuda::kAttentionBlocks),
                       .window = model_.window},
                      &units_);
  units_.resize(static_cast<size_t>(UnitCapacity(tiles)));
}

void StepInputs::AddBlocks(const step::StepPlan& plan, const step::SequenceStep& sequence) {
  const int32_t first = sequence.slot * table_size_ + sequence.block_table_index;
  for (int32_t i = 0; i < sequence.block_count; ++i) {
    const int32_t block = plan.block_ids[static_cast<size_t>(sequence.block_begin + i)];
    tables_[static_cast<size_t>(first + i)] = block;
    updates_.push_back(first + i);
    updates_.push_back(block);
  }
}

void StepInputs::AddTokens(const step::StepPlan& plan, const step::SequenceStep& sequence) {
  const Slot& slot = slots_[static_cast<size_t>(sequence.slot)];
  const auto first_row = static_cast<int32_t>(token_ids_.size());
  for (int32_t i = 0; i < sequence.token_count; ++i) {
    int32_t token = plan.token_ids[static_cast<size_t>(sequence.token_begin + i)];
    if (i == 0 && sequence.feed_sampled) {
      token = slot.sampled ? -1 - sequence.slot : slot.last_of_history;
    }
    const int32_t position = sequence.first_position + i;
    token_ids_.push_back(token);
    positions_.push_back(position);
    blocks_.push_back(
        tables_[static_cast<size_t>(sequence.slot * table_size_ + position / step::kBlockTokens)]);
  }
  AddTiles(sequence, first_row);
}

void StepInputs::AddTiles(const step::SequenceStep& sequence, int32_t first_row) {
  const bool prompt = cuda::AttentionTakesPrompts(model_.head_dim) &&
                      sequence.token_count * (model_.heads / model_.kv_heads) >= kPromptRows;
  const int32_t step = prompt ? cuda::AttentionPromptTokens(model_.heads, model_.kv_heads)
                              : cuda::AttentionTileTokens(model_.heads, model_.kv_heads);
  for (int32_t i = 0; i < sequence.token_count; i += step) {
    (prompt ? prompt_tiles_ : tiles_)
        .push_back({.first_row = first_row + i,
                    .tokens = std::min(step, sequence.token_count - i),
                    .first_position = sequence.first_position + i,
                    .slot = sequence.slot});
  }
}

void StepInputs::AddRows(const step::StepPlan& plan, int32_t index) {
  const step::SequenceStep& sequence = plan.sequences[static_cast<size_t>(index)];
  if (sequence.sample_count == 0) return;
  Slot& slot = slots_[static_cast<size_t>(sequence.slot)];
  const bool whole = !whole_rows_.IsPlain(sequence, slot.outputs);
  const int32_t first_logprobs = whole_rows_.logprobs();
  if (whole) {
    whole_rows_.Add(plan, sequence, static_cast<int32_t>(rows_.size()), slot.outputs);
  }
  for (int32_t draft = 0; draft < sequence.sample_count; ++draft) {
    rows_.push_back(
        {.sequence = index, .draft = draft, .whole = whole, .logprob_row = first_logprobs + draft});
    // The step's own sampler gives a whole row's best token to nobody.
    sample_rows_.push_back(whole ? cuda::SampleRow{.slot = limits_.max_slots}
                                 : whole_rows_.PlainRow(sequence.slot, slot.outputs));
    row_tokens_.push_back(static_cast<int32_t>(token_ids_.size()) - sequence.sample_count + draft);
  }
  slot.sampled = true;
  if (sequence.draft_count == 0) ++slot.outputs;
}

void StepInputs::TakeOutputs(int32_t slot, int32_t count) {
  slots_[static_cast<size_t>(slot)].outputs += count;
}

void StepInputs::Pad(int32_t tokens) {
  while (static_cast<int32_t>(token_ids_.size()) < tokens) {
    const auto row = static_cast<int32_t>(token_ids_.size());
    token_ids_.push_back(0);
    positions_.push_back(0);
    blocks_.push_back(limits_.kv_blocks);
    tiles_.push_back({.first_row = row, .tokens = 1, .slot = limits_.max_slots});
    sample_rows_.push_back({.slot = limits_.max_slots});
    row_tokens_.push_back(row);
  }
  PlanUnits();
}

StepShape StepInputs::shape() const {
  return {.tokens = static_cast<int32_t>(token_ids_.size()),
          .tiles = static_cast<int32_t>(tiles_.size()),
          .prompt_tiles = static_cast<int32_t>(prompt_tiles_.size()),
          .rows = static_cast<int32_t>(sample_rows_.size()),
          .table_updates = static_cast<int32_t>(updates_.size() / 2),
          .copies = static_cast<int32_t>(copies_.size() / 2),
          .whole = whole_rows_.shape()};
}

void StepInputs::Write(const StepOffsets& offsets, std::byte* memory) const {
  Copy(token_ids_, memory + offsets.token_ids);
  Copy(positions_, memory + offsets.positions);
  Copy(blocks_, memory + offsets.blocks);
  Copy(units_, memory + offsets.units);
  Copy(sample_rows_, memory + offsets.sample_rows);
  Copy(row_tokens_, memory + offsets.row_tokens);
  Copy(updates_, memory + offsets.updates);
  Copy(copies_, memory + offsets.copies);
  Copy(prompt_tiles_, memory + offsets.prompt_tiles);
  const WholeRows::Lists& lists = whole_rows_.lists();
  Copy(lists.rows, memory + offsets.whole_rows);
  Copy(lists.biases, memory + offsets.biases);
  Copy(lists.ids, memory + offsets.ids);
  Copy(lists.mask_words, memory + offsets.mask_words);
  Copy(lists.histories, memory + offsets.histories);
  Copy(lists.history_tokens, memory + offsets.history_tokens);
  Copy(lists.drafted, memory + offsets.drafted);
}

}  // namespace nibble::execution
