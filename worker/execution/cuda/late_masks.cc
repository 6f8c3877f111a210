#include "worker/execution/cuda/late_masks.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nibble::execution {

void LateMasks::Expect(int32_t rows, int32_t words) {
  rows_ = rows;
  words_ = words;
  provided_ = false;
  CHECK(bytes() <= memory_.size_bytes());
}

absl::Status LateMasks::Provide(const step::MaskBatch& masks) {
  if (!waiting()) {
    return absl::FailedPreconditionError(
        absl::StrCat("step ", masks.step_id, " waits for no masks"));
  }
  const auto stride = static_cast<size_t>(std::max(0, masks.mask_stride));
  const auto rows = static_cast<size_t>(rows_), words = static_cast<size_t>(words_);
  if (stride < words || masks.mask_words.size() < (rows - 1) * stride + words) {
    return absl::InvalidArgumentError(absl::StrCat("late masks: ", masks.mask_words.size(),
                                                   " words with stride ", masks.mask_stride, "; ",
                                                   rows, " rows need at least ", words, " each"));
  }
  for (size_t row = 0; row < rows; ++row) {
    std::copy_n(masks.mask_words.data() + row * stride, words, memory_.data() + row * words);
  }
  provided_ = true;
  return absl::OkStatus();
}

}  // namespace nibble::execution
