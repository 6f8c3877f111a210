// Sampling of rows that need nothing but their best token: greedy, or logit / temperature + gumbel.
// The numbers are those of the host's sampler, bit for bit: fp64 in a fixed order, no contraction.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/elementwise.h"

namespace nibble::cuda {

struct SampleRow {
  uint64_t stream = 0;             // of random numbers, for this output
  double inverse_temperature = 0;  // 0 = greedy
  int32_t slot = 0;
  int32_t padding = 0;
};
struct SampledToken {
  int32_t token_id = -1;
  int32_t non_finite = 0;  // 1: a logit was NaN or +infinity
};

// The best of some of a row's tokens.
struct SamplePart {
  double score = -1e300;
  int32_t token_id = -1;  // -1: none
  int32_t non_finite = 0;
};
inline constexpr int32_t kSamplePartsMax = 32;  // of a row

// Where the blocks of a row meet: device memory, zero; `arrived` is left zero.
struct SampleScratch {
  static constexpr int32_t kParts = 264;  // of all rows of a step that is cut
  SamplePart parts[kParts];
  uint32_t arrived[kParts] = {};
};

struct SampleParams {
  const float* logits = nullptr;    // [count, vocab_size]
  const SampleRow* rows = nullptr;  // [count]
  int32_t count = 0;
  int32_t vocab_size = 0;
  SampledToken* sampled = nullptr;  // [count]
  // [slots + 1]: the row's slot gets its token. The last is that of rows whose token nobody is to
  // get here (padding, and what SampleWhole samples again): several write to it, nobody reads it.
  int32_t* last_tokens = nullptr;
  SampleScratch* scratch = nullptr;  // nullptr: one block a row
};
[[nodiscard]] cudaError_t Sample(const SampleParams& params, const LaunchOptions& options);

}  // namespace nibble::cuda
