// A step in flight, as the executor remembers it until it has been waited for.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/sample.h"
#include "worker/execution/cuda/device_memory.h"
#include "worker/execution/cuda/late_masks.h"
#include "worker/execution/cuda/step_inputs.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

struct StepRecord {
  // The parts of the plan that outlive Launch. Vectors keep their memory.
  uint64_t step_id = 0;
  std::vector<step::SequenceStep> sequences;
  std::vector<int32_t> token_ids;

  // How far the step has come.
  enum class Stage : uint8_t { kLaidOut, kComputed, kSampled };
  Stage stage = Stage::kLaidOut;
  StepShape shape;
  StepOffsets offsets;
  bool decode_only = false;
  bool timed = false;
  int32_t padded = 0;  // batch of its graph; 0: none
  std::vector<OutputRow> rows;
  int32_t logprob_rows = 0;
  LateMasks late_masks;  // between computing and sampling

  // Written by the stream.
  PinnedMemory inputs;
  PinnedMemory late_mask_words;  // by the host
  PinnedMemory sampled;          // SampledToken [rows]
  PinnedMemory logprobs;         // RowLogprobs [rows that want them]
  cudaEvent_t begun = nullptr;
  cudaEvent_t done = nullptr;

  void CopyPlan(const step::StepPlan& plan);
};

// Tokens of a sequence that its rows give: the first, and each further one as long as the draft
// before it was right. 0: a logit was not finite, or every token is masked.
[[nodiscard]] int32_t AcceptedTokens(const StepRecord& record, const step::SequenceStep& sequence,
                                     std::span<const cuda::SampledToken> sampled);

// What the rows of a sequence, the first of which is `row`, add to the result; how many tokens.
int32_t AppendSequence(const StepRecord& record, const step::SequenceStep& sequence, size_t row,
                       step::StepResult* result);

}  // namespace nibble::execution
