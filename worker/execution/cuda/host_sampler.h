// Samples the rows that ask for more than their best token (filters, penalties, biases, masks,
// logprobs, drafts), and shows logits to an observer. Runs in the order of the stream: on the
// driver's thread, between the copy of the logits to the host and that of the tokens back.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "worker/execution/cpu/row_sampler.h"
#include "worker/execution/cpu/slots.h"
#include "worker/execution/cuda/step_record.h"
#include "worker/step/executor.h"

namespace nibble::execution {

class HostSampler {
 public:
  using LogitsObserver =
      std::function<void(int32_t slot, int32_t position, std::span<const float> logits)>;

  explicit HostSampler(const step::ExecutorLimits& limits);

  void set_observer(LogitsObserver observer) { observer_ = std::move(observer); }
  [[nodiscard]] bool observed() const { return observer_ != nullptr; }

  // In stream order: Begin once a step, Run for each chunk of its rows, Finish.
  void Begin(StepRecord* record);
  void Run(StepRecord* record, int32_t begin, int32_t end, float* logits);
  // Accepts tokens into the slots and writes record->last_pairs.
  void Finish(StepRecord* record);

  // Any thread. FAILED_PRECONDITION when the step waits for none.
  [[nodiscard]] absl::Status ProvideMasks(StepRecord* record, const step::MaskBatch& masks);
  // Any thread: whoever waits for masks gives up.
  void Stop();

 private:
  [[nodiscard]] bool WaitForMasks(StepRecord* record);
  void AssignMasks(StepRecord* record);
  void SampleRow(StepRecord* record, int32_t row, std::span<float> logits);

  const int32_t vocab_size_;
  SlotTable slots_;
  RowSampler sampler_;
  std::vector<float> raw_;  // logits of a row as the model gave them
  LogitsObserver observer_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;
};

}  // namespace nibble::execution
