#include "worker/execution/cpu/penalties.h"

#include <algorithm>

namespace nibble::execution {

PenaltyCounts::PenaltyCounts(int32_t slots, int32_t vocab_size)
    : vocab_size_(vocab_size), counts_(Bytes(slots, vocab_size)) {}

void PenaltyCounts::Reset(int32_t slot, std::span<const int32_t> history, int32_t prompt_count) {
  TokenCount* row = MutableRow(slot);
  std::fill_n(row, vocab_size_, TokenCount{0});
  for (size_t i = 0; i < history.size(); ++i) {
    if (i < static_cast<size_t>(prompt_count)) {
      row[history[i]] |= kInPrompt;
    } else {
      AddOutput(slot, history[i]);
    }
  }
}

void PenaltyCounts::AddOutput(int32_t slot, int32_t token_id) {
  sampling::CountOutput(&MutableRow(slot)[token_id]);
}

}  // namespace nibble::execution
