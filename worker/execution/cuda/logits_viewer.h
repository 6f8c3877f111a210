// Shows the logits of sampled rows to somebody, in the order of the stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "worker/execution/cuda/device_memory.h"
#include "worker/execution/cuda/step_record.h"

namespace nibble::execution {

class LogitsViewer {
 public:
  // Called on the driver's thread.
  using Observer =
      std::function<void(int32_t slot, int32_t position, std::span<const float> logits)>;

  // Rows of `vocab_size` logits; at most `rows` are shown at once, and `calls` times in the steps
  // in flight together.
  LogitsViewer(int32_t vocab_size, int32_t rows, int32_t calls)
      : vocab_size_(vocab_size), rows_(rows), calls_(static_cast<size_t>(calls)) {}

  // REQUIRES: no step in flight. nullptr: nobody.
  [[nodiscard]] absl::Status Set(Observer observer);
  [[nodiscard]] bool active() const { return observer_ != nullptr; }

  // Rows [begin, end) of the step, whose logits are `device_logits` until what is put onto the
  // stream next. The record stays until then.
  [[nodiscard]] absl::Status Show(const StepRecord& record, const float* device_logits,
                                  int32_t begin, int32_t end, cudaStream_t stream);

 private:
  struct Call {
    const LogitsViewer* viewer = nullptr;
    const StepRecord* record = nullptr;
    int32_t begin = 0, end = 0;
  };
  static void Run(void* call);

  const int32_t vocab_size_;
  const int32_t rows_;
  Observer observer_;
  PinnedMemory logits_;
  std::vector<Call> calls_;
  size_t next_call_ = 0;
};

}  // namespace nibble::execution
