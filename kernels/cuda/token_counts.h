// How often each token id stands in a slot's prompt and output: what penalties go by
// (kernels/sampling/penalties.h). A table of all slots, on the device from step to step.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/sample.h"
#include "kernels/sampling/penalties.h"

namespace nibble::cuda {

using sampling::kInPrompt;
using sampling::kOutputMax;
using sampling::TokenCount;

// A slot that begins with a history.
struct SlotHistory {
  int32_t slot = 0;
  int32_t begin = 0, count = 0;  // in HistoryParams::tokens
  int32_t prompt_count = 0;      // how many of them are prompt
};
struct HistoryParams {
  const SlotHistory* slots = nullptr;  // [count]
  int32_t count = 0;
  const int32_t* tokens = nullptr;
  int32_t vocab_size = 0;
  TokenCount* counts = nullptr;  // [slots, vocab_size]
};
[[nodiscard]] cudaError_t CountHistories(const HistoryParams& params, const LaunchOptions& options);

// A sequence with drafts, behind its rows' sampling: as many tokens as were foreseen right, and the
// one after them, become the slot's output.
struct DraftedSequence {
  int32_t slot = 0;
  int32_t row = 0;                           // first of draft_count + 1
  int32_t draft_begin = 0, draft_count = 0;  // in DraftParams::ids
  int32_t penalized = 0;
};
struct DraftParams {
  const DraftedSequence* sequences = nullptr;  // [count]
  int32_t count = 0;
  const int32_t* ids = nullptr;
  int32_t vocab_size = 0;
  const SampledToken* sampled = nullptr;
  TokenCount* counts = nullptr;
  int32_t* last_tokens = nullptr;
};
[[nodiscard]] cudaError_t AcceptDrafts(const DraftParams& params, const LaunchOptions& options);

}  // namespace nibble::cuda
