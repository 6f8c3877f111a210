#include "worker/execution/cuda/step_record.h"

#include <algorithm>

namespace nibble::execution {

void StepRecord::CopyPlan(const step::StepPlan& plan) {
  step_id = plan.step_id;
  sequences = plan.sequences;
  token_ids = plan.token_ids;
  mask_words = plan.mask_words;
  mask_stride = plan.mask_stride;
  if (setups.size() < plan.opened.size()) setups.resize(plan.opened.size());
  std::copy(plan.opened.begin(), plan.opened.end(), setups.begin());
  opened_count = plan.opened.size();
  wants_masks = std::any_of(sequences.begin(), sequences.end(), [](const auto& sequence) {
    return sequence.mask == step::MaskSource::kLate && sequence.sample_count > 0;
  });
  has_masks = false;
  status = absl::OkStatus();
}

int32_t AcceptedTokens(const StepRecord& record, const step::SequenceStep& sequence,
                       std::span<const HostOutcome> outcomes) {
  const int32_t* drafts =
      record.token_ids.data() + sequence.token_begin + sequence.token_count - sequence.draft_count;
  int32_t accepted = 0;
  for (int32_t i = 0; i < sequence.sample_count; ++i) {
    const Candidate& best = outcomes[static_cast<size_t>(i)].best;
    if (best.non_finite != 0 || best.token_id < 0) return 0;
    ++accepted;
    if (i < sequence.draft_count && best.token_id != drafts[i]) break;
  }
  return accepted;
}

}  // namespace nibble::execution
