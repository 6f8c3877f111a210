// A step in flight, as the executor remembers it until it has been waited for.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cuda/sample.h"
#include "worker/execution/cpu/row_sampler.h"
#include "worker/execution/cuda/device_memory.h"
#include "worker/execution/cuda/step_inputs.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

// What became of a row that the host sampled.
struct HostOutcome {
  Candidate best;
  float logprob = 0;
  std::array<step::TokenLogprob, step::kMaxLogprobs> top;
};

struct StepRecord {
  // The parts of the plan that outlive Launch. Vectors keep their memory.
  uint64_t step_id = 0;
  std::vector<step::SequenceStep> sequences;
  std::vector<int32_t> token_ids;
  std::vector<uint32_t> mask_words;
  int32_t mask_stride = 0;
  std::vector<step::SlotSetup> setups;  // the first opened_count
  size_t opened_count = 0;
  std::vector<OutputRow> rows;
  bool on_host = false;  // rows are sampled, or slots opened, by the host's sampler

  // Written by the stream.
  PinnedMemory inputs;
  PinnedMemory sampled;     // SampledToken [rows]
  PinnedMemory last_pairs;  // int32 [sequences][2]: slot or -1, token
  cudaEvent_t begun = nullptr;
  cudaEvent_t done = nullptr;

  // Written by the host's sampler, in stream order.
  std::vector<HostOutcome> outcomes;   // per row
  std::vector<const uint32_t*> masks;  // per row; nullptr: none
  step::MaskBatch late_masks;
  bool wants_masks = false;
  bool has_masks = false;
  absl::Status status;

  [[nodiscard]] std::span<const step::SlotSetup> opened() const {
    return {setups.data(), opened_count};
  }
  void CopyPlan(const step::StepPlan& plan);
};

// Tokens of a sequence that its rows give: the first, and each further one as long as the draft
// before it was right. 0: a logit was not finite, or every token is masked.
[[nodiscard]] int32_t AcceptedTokens(const StepRecord& record, const step::SequenceStep& sequence,
                                     std::span<const HostOutcome> outcomes);

}  // namespace nibble::execution
