#include "worker/execution/cuda/step_record.h"

#include <algorithm>

#include "kernels/cuda/sample_whole.h"

namespace nibble::execution {

void StepRecord::CopyPlan(const step::StepPlan& plan) {
  step_id = plan.step_id;
  sequences = plan.sequences;
  token_ids = plan.token_ids;
}

int32_t AcceptedTokens(const StepRecord& record, const step::SequenceStep& sequence,
                       std::span<const cuda::SampledToken> sampled) {
  const int32_t* drafts =
      record.token_ids.data() + sequence.token_begin + sequence.token_count - sequence.draft_count;
  int32_t accepted = 0;
  for (int32_t i = 0; i < sequence.sample_count; ++i) {
    const cuda::SampledToken& token = sampled[static_cast<size_t>(i)];
    if (token.non_finite != 0 || token.token_id < 0) return 0;
    ++accepted;
    if (i < sequence.draft_count && token.token_id != drafts[i]) break;
  }
  return accepted;
}

int32_t AppendSequence(const StepRecord& record, const step::SequenceStep& sequence, size_t row,
                       step::StepResult* result) {
  const std::span<const cuda::SampledToken> tokens(record.sampled.as<cuda::SampledToken>() + row,
                                                   static_cast<size_t>(sequence.sample_count));
  step::SampledSequence sampled{.slot = sequence.slot,
                                .token_begin = static_cast<int32_t>(result->tokens.size()),
                                .top_begin = static_cast<int32_t>(result->top_logprobs.size()),
                                .top_count = std::max(0, sequence.logprobs)};
  sampled.token_count = AcceptedTokens(record, sequence, tokens);
  sampled.non_finite = sampled.token_count == 0;
  for (int32_t i = 0; i < sampled.token_count; ++i) {
    const auto at = static_cast<size_t>(i);
    result->tokens.push_back({.token_id = tokens[at].token_id});
    if (sequence.logprobs < 0) continue;
    const cuda::RowLogprobs& logprobs =
        record.logprobs.as<cuda::RowLogprobs>()[record.rows[row + at].logprob_row];
    result->tokens.back().logprob = logprobs.sampled;
    for (int32_t k = 0; k < sampled.top_count; ++k) {
      result->top_logprobs.push_back(
          {.token_id = logprobs.token_ids[k], .logprob = logprobs.logprobs[k]});
    }
  }
  result->sequences.push_back(sampled);
  return sampled.token_count;
}

}  // namespace nibble::execution
