// What a sampler's penalties take off a logit, the same on a CPU and a GPU.
#pragma once

#include <cstdint>

namespace nibble::sampling {

// One entry per token id: kInPrompt, and below it the number of times in the output.
using TokenCount = uint16_t;
inline constexpr TokenCount kInPrompt = 0x8000;
inline constexpr TokenCount kOutputMax = 0x7fff;  // counts stay there

constexpr void CountOutput(TokenCount* count) {
  if ((*count & kOutputMax) < kOutputMax) ++*count;
}

// The logit after the three penalties: repetition over prompt and output (divides a positive logit,
// multiplies a negative one), then frequency and presence over the output. `Params` has all three.
template <typename Params>
[[nodiscard]] constexpr float Penalized(float logit, TokenCount count, const Params& params) {
  if (count == 0) return logit;
  logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
  const int32_t outputs = count & kOutputMax;
  if (outputs > 0) {
    logit -= params.frequency_penalty * static_cast<float>(outputs) + params.presence_penalty;
  }
  return logit;
}

}  // namespace nibble::sampling
