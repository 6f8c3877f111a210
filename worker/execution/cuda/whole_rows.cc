#include "worker/execution/cuda/whole_rows.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/sampling/random.h"
#include "worker/execution/cpu/penalties.h"
#include "worker/execution/cpu/row_sampler.h"

namespace nibble::execution {
namespace {

constexpr int64_t kPlanBytesMax = int64_t{4} << 20;  // of a plan's lists, and of late masks
// Of a slot: a row has room for its drafts beside them.
constexpr int32_t kBiasesAndStopsMax = cuda::kSparseMax - kDraftsMax;

static_assert(cuda::kTopLogprobsMax == step::kMaxLogprobs);

int64_t RowsMax(const step::ExecutorLimits& limits) { return limits.max_step_tokens; }

int64_t MaskBytes(const step::ExecutorLimits& limits, int64_t rows) {
  return rows * MaskWords(limits.vocab_size) * int64_t{4};
}

cuda::WholeRow AskedBy(const step::SlotSetup& setup, int32_t vocab_size) {
  const step::SamplingParams& params = setup.sampling;
  const bool greedy = params.temperature < kGreedyBelow;
  const bool top_k = params.top_k > 0 && params.top_k < vocab_size;
  return {.inverse_temperature = greedy ? 0.0 : 1.0 / static_cast<double>(params.temperature),
          .slot = setup.slot,
          .repetition_penalty = params.repetition_penalty,
          .frequency_penalty = params.frequency_penalty,
          .presence_penalty = params.presence_penalty,
          .top_p = params.top_p,
          .typical_p = params.typical_p,
          .min_p = params.min_p,
          .top_k = top_k ? params.top_k : 0,
          .penalized = UsesPenalties(params) ? 1 : 0};
}

// Appends and returns where.
template <typename T>
int32_t Append(const std::vector<T>& from, std::vector<T>* to) {
  const auto begin = static_cast<int32_t>(to->size());
  to->insert(to->end(), from.begin(), from.end());
  return begin;
}

}  // namespace

WholeRows::WholeRows(const step::ExecutorLimits& limits)
    : limits_(limits), slots_(static_cast<size_t>(limits.max_slots)) {
  lists_.rows.reserve(static_cast<size_t>(limits.max_step_tokens));
  lists_.drafted.reserve(slots_.size());
  lists_.histories.reserve(slots_.size());
}

WholeShape WholeRows::LargestShape(const step::ExecutorLimits& limits) {
  const int64_t carried =
      MaskBytes(limits, RowsMax(limits)) + int64_t{limits.max_slots} * limits.max_context * 4;
  const int32_t of_slots = limits.max_slots * kBiasesAndStopsMax;
  return {.rows = limits.max_step_tokens,
          .biases = of_slots,
          .ids = of_slots + limits.max_step_tokens,
          .mask_words = static_cast<int32_t>(std::min(carried, kPlanBytesMax) / 4),
          .histories = limits.max_slots,
          .drafted = limits.max_slots};
}

int64_t WholeRows::LateMaskBytesMax(const step::ExecutorLimits& limits) {
  return std::min(MaskBytes(limits, RowsMax(limits)), kPlanBytesMax);
}

absl::Status WholeRows::CheckSizes() const {
  const auto carried =
      static_cast<int64_t>(lists_.mask_words.size() + lists_.history_tokens.size());
  const int64_t carried_max = LargestShape(limits_).mask_words;
  if (carried > carried_max) {
    return absl::InvalidArgumentError(
        absl::StrCat("step plan: masks and histories of slots with penalties take ", carried * 4,
                     " bytes; limit is ", carried_max * 4));
  }
  const int64_t late = MaskBytes(limits_, late_masks_);
  if (late > LateMaskBytesMax(limits_)) {
    return absl::InvalidArgumentError(absl::StrCat("step plan: late masks take ", late,
                                                   " bytes; limit is ", LateMaskBytesMax(limits_)));
  }
  return absl::OkStatus();
}

void WholeRows::Clear() {
  lists_.rows.clear();
  lists_.biases.clear();
  lists_.ids.clear();
  lists_.mask_words.clear();
  lists_.histories.clear();
  lists_.history_tokens.clear();
  lists_.drafted.clear();
  plan_mask_words_ = 0;
  late_masks_ = 0;
  logprobs_ = 0;
}

absl::Status WholeRows::Open(const step::SlotSetup& setup) {
  const size_t sparse = setup.sampling.logit_bias.size() + setup.stop_ids.size();
  if (sparse > static_cast<size_t>(kBiasesAndStopsMax)) {
    return absl::InvalidArgumentError(absl::StrCat("step plan: slot ", setup.slot, " has ", sparse,
                                                   " biases and stop ids; limit is ",
                                                   kBiasesAndStopsMax));
  }
  Slot& slot = slots_[static_cast<size_t>(setup.slot)];
  const RowRequest request{.params = &setup.sampling};
  slot.seed = setup.seed;
  slot.asked = AskedBy(setup, limits_.vocab_size);
  slot.min_tokens = setup.stop_ids.empty() ? 0 : setup.min_tokens;
  slot.plain = WorksOnPartOfRow(request, limits_.vocab_size) && slot.asked.penalized == 0 &&
               setup.sampling.logit_bias.empty();
  const auto exists = [&](int32_t id) { return id >= 0 && id < limits_.vocab_size; };
  slot.biases.clear();
  for (const step::LogitBias& bias : setup.sampling.logit_bias) {
    if (exists(bias.token_id)) slot.biases.push_back({bias.token_id, bias.bias});
  }
  slot.stop_ids.clear();
  std::copy_if(setup.stop_ids.begin(), setup.stop_ids.end(), std::back_inserter(slot.stop_ids),
               exists);
  if (slot.asked.penalized != 0) {
    lists_.histories.push_back({.slot = setup.slot,
                                .begin = Append(setup.history, &lists_.history_tokens),
                                .count = static_cast<int32_t>(setup.history.size()),
                                .prompt_count = setup.prompt_count});
  }
  return absl::OkStatus();
}

bool WholeRows::IsPlain(const step::SequenceStep& sequence, int64_t outputs) const {
  const Slot& slot = slots_[static_cast<size_t>(sequence.slot)];
  return slot.plain && sequence.logprobs < 0 && sequence.sample_count == 1 &&
         sequence.mask == step::MaskSource::kNone && outputs >= slot.min_tokens;
}

uint64_t WholeRows::Slot::Stream(int64_t output) const {
  return asked.inverse_temperature > 0 ? sampling::OutputStream(seed, static_cast<uint64_t>(output))
                                       : 0;
}

cuda::SampleRow WholeRows::PlainRow(int32_t slot, int64_t outputs) const {
  const Slot& from = slots_[static_cast<size_t>(slot)];
  return {.stream = from.Stream(outputs),
          .inverse_temperature = from.asked.inverse_temperature,
          .slot = slot};
}

void WholeRows::AddMask(const step::StepPlan& plan, step::MaskSource source, cuda::WholeRow* row) {
  const int32_t words = MaskWords(limits_.vocab_size);
  if (source == step::MaskSource::kLate) {
    row->mask = cuda::WholeRow::kMaskLate;
    row->mask_begin = late_masks_++ * words;
  } else if (source == step::MaskSource::kHere) {
    const auto first = plan.mask_words.begin() + static_cast<std::ptrdiff_t>(plan_mask_words_);
    row->mask = cuda::WholeRow::kMaskHere;
    row->mask_begin = static_cast<int32_t>(lists_.mask_words.size());
    lists_.mask_words.insert(lists_.mask_words.end(), first, first + words);
    plan_mask_words_ += static_cast<size_t>(plan.mask_stride);
  }
}

void WholeRows::Add(const step::StepPlan& plan, const step::SequenceStep& sequence,
                    int32_t first_row, int64_t outputs) {
  const Slot& slot = slots_[static_cast<size_t>(sequence.slot)];
  cuda::WholeRow row = slot.asked;
  row.bias_begin = Append(slot.biases, &lists_.biases);
  row.bias_count = static_cast<int32_t>(slot.biases.size());
  row.logprobs = sequence.logprobs;
  row.feeds = sequence.draft_count == 0 ? 1 : 0;
  const bool forbids = outputs < slot.min_tokens;
  if (forbids) row.forbidden_begin = Append(slot.stop_ids, &lists_.ids);
  row.draft_begin = static_cast<int32_t>(lists_.ids.size());
  const auto drafts =
      plan.token_ids.begin() + sequence.token_begin + sequence.token_count - sequence.draft_count;
  lists_.ids.insert(lists_.ids.end(), drafts, drafts + sequence.draft_count);
  if (sequence.draft_count > 0) {
    lists_.drafted.push_back({.slot = sequence.slot,
                              .row = first_row,
                              .draft_begin = row.draft_begin,
                              .draft_count = sequence.draft_count,
                              .penalized = row.penalized});
  }
  for (int32_t draft = 0; draft < sequence.sample_count; ++draft) {
    const int64_t output = outputs + draft;
    row.row = first_row + draft;
    row.stream = slot.Stream(output);
    row.forbidden_count = output < slot.min_tokens ? static_cast<int32_t>(slot.stop_ids.size()) : 0;
    row.draft_count = row.penalized != 0 ? draft : 0;
    AddMask(plan, sequence.mask, &row);
    if (row.logprobs >= 0) row.logprob_row = logprobs_++;
    lists_.rows.push_back(row);
  }
}

WholeShape WholeRows::shape() const {
  const auto size = [](const auto& list) { return static_cast<int32_t>(list.size()); };
  return {.rows = size(lists_.rows),
          .biases = size(lists_.biases),
          .ids = size(lists_.ids),
          .mask_words = size(lists_.mask_words),
          .histories = size(lists_.histories),
          .history_tokens = size(lists_.history_tokens),
          .drafted = size(lists_.drafted)};
}

}  // namespace nibble::execution
