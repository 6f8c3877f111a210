// The masks of a step that come when it has been launched.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

// One thread.
class LateMasks {
 public:
  // Where masks go that the device copies: room for the rows of every step. Borrowed.
  void set_memory(std::span<uint32_t> memory) { memory_ = memory; }

  // A new step: `rows` wait for a mask of so many words each.
  void Expect(int32_t rows, int32_t words);
  [[nodiscard]] bool waiting() const { return rows_ > 0 && !provided_; }
  // FAILED_PRECONDITION: the step waits for none. INVALID_ARGUMENT: they are too short.
  [[nodiscard]] absl::Status Provide(const step::MaskBatch& masks);

  // Row behind row, without what lies between them in a MaskBatch.
  [[nodiscard]] size_t bytes() const {
    return static_cast<size_t>(rows_) * static_cast<size_t>(words_) * sizeof(uint32_t);
  }

 private:
  std::span<uint32_t> memory_;
  int32_t rows_ = 0, words_ = 0;
  bool provided_ = false;
};

}  // namespace nibble::execution
