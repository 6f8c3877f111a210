// How often each token id stands in a slot's prompt and output.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/sampling/penalties.h"
#include "worker/execution/cpu/memory.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

using sampling::kInPrompt;
using sampling::kOutputMax;
using sampling::Penalized;
using sampling::TokenCount;

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

}  // namespace nibble::execution
