// The rows of a step that ask for more than their best token, as the device samples them
// (kernels/cuda/sample_whole.h): what their slots asked for, and the step's lists of biases, ids,
// masks and histories.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/sample_whole.h"
#include "kernels/cuda/token_counts.h"
#include "worker/step/executor.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

// How long the lists of a step are.
struct WholeShape {
  int32_t rows = 0;
  int32_t biases = 0;
  int32_t ids = 0;  // forbidden ones and drafts
  int32_t mask_words = 0;
  int32_t histories = 0;
  int32_t history_tokens = 0;
  int32_t drafted = 0;  // sequences with drafts
};

[[nodiscard]] constexpr int32_t MaskWords(int32_t vocab_size) { return (vocab_size + 31) / 32; }

// Follows the slots through the plans. One thread.
class WholeRows {
 public:
  // The lists of a step. Vectors keep their memory.
  struct Lists {
    std::vector<cuda::WholeRow> rows;  // by rising row of the step
    std::vector<cuda::TokenBias> biases;
    std::vector<int32_t> ids;
    std::vector<uint32_t> mask_words;
    std::vector<cuda::SlotHistory> histories;
    std::vector<int32_t> history_tokens;
    std::vector<cuda::DraftedSequence> drafted;
  };

  explicit WholeRows(const step::ExecutorLimits& limits);

  // A new step.
  void Clear();
  // INVALID_ARGUMENT: more biases and stop ids than a row has room for.
  [[nodiscard]] absl::Status Open(const step::SlotSetup& setup);

  // Whether the best token of the raw logits, greedily or at a temperature, is all that the
  // sequence asks for when its slot has given `outputs` tokens.
  [[nodiscard]] bool IsPlain(const step::SequenceStep& sequence, int64_t outputs) const;
  // The row of a plain sequence when its slot has given `outputs` tokens.
  [[nodiscard]] cuda::SampleRow PlainRow(int32_t slot, int64_t outputs) const;
  // The rows of a sequence that is not plain, the first of which is `first_row` of the step.
  void Add(const step::StepPlan& plan, const step::SequenceStep& sequence, int32_t first_row,
           int64_t outputs);

  [[nodiscard]] const Lists& lists() const { return lists_; }
  [[nodiscard]] WholeShape shape() const;
  [[nodiscard]] int32_t late_masks() const { return late_masks_; }  // rows that wait for theirs
  [[nodiscard]] int32_t logprobs() const { return logprobs_; }      // rows that want them

  // INVALID_ARGUMENT: a list is longer than in LargestShape, or late masks are.
  [[nodiscard]] absl::Status CheckSizes() const;
  // Masks and histories come in a plan, whose size has a limit of its own: together they take the
  // bytes that mask_words stand for.
  [[nodiscard]] static WholeShape LargestShape(const step::ExecutorLimits& limits);
  [[nodiscard]] static int64_t LateMaskBytesMax(const step::ExecutorLimits& limits);

 private:
  struct Slot {
    uint64_t seed = 0;
    bool plain = false;  // whatever the step
    int64_t min_tokens = 0;
    cuda::WholeRow asked;  // the parts that stay
    std::vector<cuda::TokenBias> biases;
    std::vector<int32_t> stop_ids;

    [[nodiscard]] uint64_t Stream(int64_t output) const;  // of random numbers
  };
  void AddMask(const step::StepPlan& plan, step::MaskSource source, cuda::WholeRow* row);

  const step::ExecutorLimits limits_;
  std::vector<Slot> slots_;
  Lists lists_;
  size_t plan_mask_words_ = 0;  // of the plan's that are used up
  int32_t late_masks_ = 0;
  int32_t logprobs_ = 0;
};

}  // namespace nibble::execution
