// Sampling of rows that ask for more than their best token: penalties, biases, masks, filters,
// logprobs, drafts. Tokens, logprobs and their order are those of the host's sampler
// (worker/execution/cpu/row_sampler.h, which states the law), bit for bit: comparisons in the same
// order, sums in whole numbers. Logits stay as they are.
//
// A row is one cluster of up to eight blocks, each with its part of the vocabulary; one block where
// rows fill the GPU, or where there are no clusters. A filter takes two passes over the row's
// logits (a histogram of weights by gap, then the tokens of the bucket where the share is reached),
// more only where more than a thousand tokens are nearly as likely there.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/token_counts.h"

namespace nibble::cuda {

inline constexpr int32_t kSampleVocabMax = 1 << 19;  // sums of weights stay below 2^64
inline constexpr int32_t kSparseMax = 1024;          // biases, forbidden ids and drafts of a row
inline constexpr int32_t kTopLogprobsMax = 20;

struct TokenBias {
  int32_t token_id = 0;
  float bias = 0;
};

struct WholeRow {
  enum Mask : int32_t { kNoMask, kMaskHere, kMaskLate };

  uint64_t stream = 0;             // of random numbers, for this output
  double inverse_temperature = 0;  // 0 = greedy
  int32_t row = 0;                 // of the step
  int32_t slot = 0;
  float repetition_penalty = 1, frequency_penalty = 0, presence_penalty = 0;
  float top_p = 1, typical_p = 1, min_p = 0;
  int32_t top_k = 0;      // 0: off
  int32_t penalized = 0;  // 1: by the slot's counts
  // Into WholeParams::biases (by rising token id) and ::ids; all within the vocabulary.
  int32_t bias_begin = 0, bias_count = 0;
  int32_t forbidden_begin = 0, forbidden_count = 0;
  int32_t draft_begin = 0, draft_count = 0;  // output assumed before this row
  Mask mask = kNoMask;
  int32_t mask_begin = 0;   // word
  int32_t logprobs = -1;    // -1: none, else alternatives
  int32_t logprob_row = 0;  // into WholeParams::logprobs
  int32_t feeds = 0;        // 1: the token becomes the slot's last, and counts as output
  int32_t padding = 0;
};

struct RowLogprobs {
  float sampled = 0;
  int32_t token_ids[kTopLogprobsMax] = {};  // most probable first
  float logprobs[kTopLogprobsMax] = {};
};

struct WholeParams {
  const float* logits = nullptr;   // [rows of a chunk, vocab_size]
  int32_t first_row = 0;           // of the step: the chunk's first
  const WholeRow* rows = nullptr;  // [count]
  int32_t count = 0;
  int32_t vocab_size = 0;  // at most kSampleVocabMax
  const TokenBias* biases = nullptr;
  const int32_t* ids = nullptr;
  const uint32_t* masks = nullptr;  // one bit per token id, 1 = allowed
  const uint32_t* late_masks = nullptr;
  TokenCount* counts = nullptr;     // [slots, vocab_size]
  SampledToken* sampled = nullptr;  // [rows of the step]; -1: every token is masked
  int32_t* last_tokens = nullptr;   // [slots]
  RowLogprobs* logprobs = nullptr;
};
// `clusters`: the kernels are Hopper's (probe.h).
[[nodiscard]] cudaError_t SampleWhole(const WholeParams& params, bool clusters,
                                      const LaunchOptions& options);

}  // namespace nibble::cuda
