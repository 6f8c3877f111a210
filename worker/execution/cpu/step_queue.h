// Steps on their way between the thread that launches them and the driver that runs them: at most
// two launched and not yet waited for.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

// Entries are used again and again, so that a queue that has seen its largest step does not
// allocate. After a step has failed, every later call returns that step's error.
class StepQueue {
 public:
  struct Entry {
    step::StepPlan plan;                  // without `opened`
    std::vector<step::SlotSetup> setups;  // never shrinks, to keep what its elements hold
    size_t opened_count = 0;
    step::MaskBatch masks;
    bool wants_masks = false;
    bool has_masks = false;
    step::StepResult result;

    [[nodiscard]] std::span<const step::SlotSetup> opened() const {
      return {setups.data(), opened_count};
    }
  };

  // The launching thread. FAILED_PRECONDITION for a third step, or masks that no step waits for.
  [[nodiscard]] absl::Status Launch(const step::StepPlan& plan);
  [[nodiscard]] absl::Status ProvideMasks(const step::MaskBatch& masks);
  [[nodiscard]] absl::Status Wait(Deadline deadline, step::StepResult* result);

  // The driver. NextToRun blocks; nullptr when stopped or failed.
  [[nodiscard]] Entry* NextToRun();
  void FinishRun(const absl::Status& status);
  // Late masks of the step that runs. CANCELLED when stopped.
  [[nodiscard]] absl::StatusOr<const step::MaskBatch*> WaitForMasks();

  // Any thread: ends the driver after the step that runs.
  void Stop();

 private:
  static constexpr uint64_t kDepth = 2;

  Entry& At(uint64_t step) { return entries_[step % kDepth]; }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::array<Entry, kDepth> entries_;
  // Steps ever launched, run and waited for; waited <= run <= launched <= waited + kDepth.
  uint64_t launched_ = 0;
  uint64_t run_ = 0;
  uint64_t waited_ = 0;
  bool stopped_ = false;
  absl::Status failure_;
};

}  // namespace nibble::execution
