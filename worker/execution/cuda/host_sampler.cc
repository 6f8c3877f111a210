#include "worker/execution/cuda/host_sampler.h"

#include "absl/strings/str_cat.h"

namespace nibble::execution {

HostSampler::HostSampler(const step::ExecutorLimits& limits)
    : vocab_size_(limits.vocab_size), slots_(limits), sampler_(limits.vocab_size) {}

void HostSampler::Begin(StepRecord* record) {
  for (const step::SlotSetup& setup : record->opened()) slots_.Open(setup);
  record->outcomes.resize(record->rows.size());
  record->masks.assign(record->rows.size(), nullptr);
  if (record->wants_masks && !WaitForMasks(record)) return;
  AssignMasks(record);
}

bool HostSampler::WaitForMasks(StepRecord* record) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return stopped_ || record->has_masks; });
  if (record->has_masks) return true;
  record->status = absl::CancelledError("the executor ends");
  return false;
}

absl::Status HostSampler::ProvideMasks(StepRecord* record, const step::MaskBatch& masks) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!record->wants_masks || record->has_masks) {
    return absl::FailedPreconditionError(
        absl::StrCat("no step in flight waits for masks of step ", masks.step_id));
  }
  record->late_masks.mask_words = masks.mask_words;
  record->late_masks.mask_stride = masks.mask_stride;
  record->has_masks = true;
  changed_.notify_all();
  return absl::OkStatus();
}

void HostSampler::Stop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  stopped_ = true;
  changed_.notify_all();
}

void HostSampler::AssignMasks(StepRecord* record) {
  size_t here = 0, late = 0;  // words used so far
  const auto words = static_cast<size_t>((vocab_size_ + 31) / 32);
  for (size_t i = 0; i < record->rows.size(); ++i) {
    const step::SequenceStep& sequence =
        record->sequences[static_cast<size_t>(record->rows[i].sequence)];
    if (sequence.mask == step::MaskSource::kNone) continue;
    const bool is_late = sequence.mask == step::MaskSource::kLate;
    const auto& source = is_late ? record->late_masks.mask_words : record->mask_words;
    const int32_t stride = is_late ? record->late_masks.mask_stride : record->mask_stride;
    size_t& used = is_late ? late : here;
    if (stride < static_cast<int32_t>(words) || source.size() < used + words) {
      record->status = absl::InvalidArgumentError(absl::StrCat(
          "masks: ", source.size(), " words with stride ", stride, "; a row needs ", words));
      return;
    }
    record->masks[i] = source.data() + used;
    used += static_cast<size_t>(stride);
  }
}

void HostSampler::Run(StepRecord* record, int32_t begin, int32_t end, float* logits) {
  if (!record->status.ok()) return;
  for (int32_t row = begin; row < end; ++row) {
    const OutputRow& sampled = record->rows[static_cast<size_t>(row)];
    if (!sampled.on_host) continue;
    const std::span<float> here(logits + static_cast<int64_t>(row - begin) * vocab_size_,
                                static_cast<size_t>(vocab_size_));
    if (observer_ != nullptr) {
      const step::SequenceStep& sequence = record->sequences[static_cast<size_t>(sampled.sequence)];
      observer_(
          sequence.slot,
          sequence.first_position + sequence.token_count - sequence.sample_count + sampled.draft,
          here);
    }
    SampleRow(record, row, here);
  }
}

void HostSampler::SampleRow(StepRecord* record, int32_t row, std::span<float> logits) {
  const OutputRow& sampled = record->rows[static_cast<size_t>(row)];
  const step::SequenceStep& sequence = record->sequences[static_cast<size_t>(sampled.sequence)];
  const Slot& slot = slots_.slot(sequence.slot);
  RowRequest request{.params = &slot.params};
  if (slot.penalized) request.counts = slots_.penalties().Row(sequence.slot);
  request.mask = record->masks[static_cast<size_t>(row)];
  if (static_cast<int64_t>(sampled.output_index) < slot.min_tokens) {
    request.forbidden = slot.stop_ids;
  }
  request.drafts = std::span(record->token_ids)
                       .subspan(static_cast<size_t>(sequence.token_begin + sequence.token_count -
                                                    sequence.draft_count),
                                static_cast<size_t>(sampled.draft));
  request.seed = slot.seed;
  request.output_index = sampled.output_index;
  request.logprobs = sequence.logprobs;
  HostOutcome& outcome = record->outcomes[static_cast<size_t>(row)];
  outcome.logprob = 0;
  double log_sum_exp = 0;
  if (request.logprobs >= 0 && !HasNonFinite(logits)) {
    log_sum_exp = sampler_.LogSumExp(logits);
    sampler_.TopLogprobs(logits, log_sum_exp, request.logprobs, outcome.top.data());
  }
  // Sampling changes the row in place.
  raw_.assign(logits.begin(), logits.end());
  outcome.best = sampler_.Sample(request, logits);
  if (request.logprobs >= 0 && outcome.best.token_id >= 0) {
    outcome.logprob = static_cast<float>(
        static_cast<double>(raw_[static_cast<size_t>(outcome.best.token_id)]) - log_sum_exp);
  }
}

void HostSampler::Finish(StepRecord* record) {
  auto* pairs = record->last_pairs.as<int32_t>();
  size_t row = 0;
  for (size_t i = 0; i < record->sequences.size(); ++i) {
    const step::SequenceStep& sequence = record->sequences[i];
    const auto rows = static_cast<size_t>(sequence.sample_count);
    pairs[2 * i] = -1;
    pairs[2 * i + 1] = 0;
    if (rows > 0 && record->rows[row].on_host && record->status.ok()) {
      const std::span<const HostOutcome> outcomes(&record->outcomes[row], rows);
      const int32_t accepted = AcceptedTokens(*record, sequence, outcomes);
      for (int32_t t = 0; t < accepted; ++t) {
        slots_.AddOutput(sequence.slot, outcomes[static_cast<size_t>(t)].best.token_id);
      }
      if (accepted > 0) {
        pairs[2 * i] = sequence.slot;
        pairs[2 * i + 1] = outcomes[static_cast<size_t>(accepted - 1)].best.token_id;
      }
    }
    row += rows;
  }
}

}  // namespace nibble::execution
