// How often each token id stands in a slot's prompt and output.
#pragma once

#include <cstdint>
#include <span>

#include "worker/execution/cpu/memory.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

// One entry per token id: kInPrompt, and below it the number of times in the output.
using TokenCount = uint16_t;
inline constexpr TokenCount kInPrompt = 0x8000;
inline constexpr TokenCount kOutputMax = 0x7fff;  // counts stay there

[[nodiscard]] inline bool UsesPenalties(const step::SamplingParams& params) {
  return params.presence_penalty != 0 || params.frequency_penalty != 0 ||
         params.repetition_penalty != 1;
}

// Counts of all slots, [slots, vocab]. Owned by the driver thread; other threads read between
// barriers. Memory of slots that never use penalties is never touched.
class PenaltyCounts {
 public:
  PenaltyCounts(int32_t slots, int32_t vocab_size);

  [[nodiscard]] static int64_t Bytes(int32_t slots, int32_t vocab_size) {
    return static_cast<int64_t>(slots) * vocab_size * static_cast<int64_t>(sizeof(TokenCount));
  }

  // Starts a slot with `history`, of which the first prompt_count are prompt.
  void Reset(int32_t slot, std::span<const int32_t> history, int32_t prompt_count);
  void AddOutput(int32_t slot, int32_t token_id);

  [[nodiscard]] const TokenCount* Row(int32_t slot) const {
    return counts_.as<TokenCount>() + static_cast<int64_t>(slot) * vocab_size_;
  }

 private:
  TokenCount* MutableRow(int32_t slot) {
    return counts_.as<TokenCount>() + static_cast<int64_t>(slot) * vocab_size_;
  }

  const int32_t vocab_size_;
  MappedMemory counts_;
};

// The logit after the three penalties: repetition over prompt and output (divides a positive logit,
// multiplies a negative one), then frequency and presence over the output.
[[nodiscard]] inline float Penalized(float logit, TokenCount count,
                                     const step::SamplingParams& params) {
  if (count == 0) return logit;
  logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
  const int32_t outputs = count & kOutputMax;
  if (outputs > 0) {
    logit -= params.frequency_penalty * static_cast<float>(outputs) + params.presence_penalty;
  }
  return logit;
}

}  // namespace nibble::execution
