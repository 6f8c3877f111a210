#include "worker/execution/cpu/step_queue.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nibble::execution {
namespace {

// Copies into vectors that keep their memory.
void CopyPlan(const step::StepPlan& plan, StepQueue::Entry* entry) {
  step::StepPlan& copy = entry->plan;
  copy.step_id = plan.step_id;
  copy.closed = plan.closed;
  copy.block_copies = plan.block_copies;
  copy.sequences = plan.sequences;
  copy.token_ids = plan.token_ids;
  copy.block_ids = plan.block_ids;
  copy.mask_words = plan.mask_words;
  copy.mask_stride = plan.mask_stride;
  if (entry->setups.size() < plan.opened.size()) entry->setups.resize(plan.opened.size());
  std::copy(plan.opened.begin(), plan.opened.end(), entry->setups.begin());
  entry->opened_count = plan.opened.size();
}

bool WantsMasks(const step::StepPlan& plan) {
  return std::any_of(plan.sequences.begin(), plan.sequences.end(),
                     [](const step::SequenceStep& sequence) {
                       return sequence.mask == step::MaskSource::kLate && sequence.sample_count > 0;
                     });
}

}  // namespace

absl::Status StepQueue::Launch(const step::StepPlan& plan) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_.ok()) return failure_;
  if (launched_ - waited_ == kDepth) {
    return absl::FailedPreconditionError(
        absl::StrCat("step ", plan.step_id, " launched while ", kDepth, " are in flight"));
  }
  Entry& entry = At(launched_);
  CopyPlan(plan, &entry);
  entry.wants_masks = WantsMasks(plan);
  entry.has_masks = false;
  ++launched_;
  changed_.notify_all();
  return absl::OkStatus();
}

absl::Status StepQueue::ProvideMasks(const step::MaskBatch& masks) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!failure_.ok()) return failure_;
  for (uint64_t step = run_; step < launched_; ++step) {
    Entry& entry = At(step);
    if (entry.plan.step_id != masks.step_id || !entry.wants_masks || entry.has_masks) continue;
    entry.masks.step_id = masks.step_id;
    entry.masks.mask_words = masks.mask_words;
    entry.masks.mask_stride = masks.mask_stride;
    entry.has_masks = true;
    changed_.notify_all();
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(
      absl::StrCat("no step in flight waits for masks of step ", masks.step_id));
}

absl::Status StepQueue::Wait(Deadline deadline, step::StepResult* result) {
  result->Clear();
  std::unique_lock<std::mutex> lock(mutex_);
  if (waited_ == launched_ && failure_.ok()) {
    return absl::FailedPreconditionError("no step in flight");
  }
  const auto done = [this] { return run_ > waited_ || !failure_.ok(); };
  if (deadline == Deadline::max()) {
    changed_.wait(lock, done);
  } else if (!changed_.wait_until(lock, deadline, done)) {
    return absl::DeadlineExceededError(
        absl::StrCat("step ", At(waited_).plan.step_id, " is not done by its deadline"));
  }
  if (run_ == waited_) return failure_;
  const step::StepResult& from = At(waited_).result;
  result->step_id = from.step_id;
  result->sequences = from.sequences;
  result->tokens = from.tokens;
  result->top_logprobs = from.top_logprobs;
  result->timings = from.timings;
  ++waited_;
  return absl::OkStatus();
}

StepQueue::Entry* StepQueue::NextToRun() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return stopped_ || !failure_.ok() || run_ < launched_; });
  return stopped_ || !failure_.ok() ? nullptr : &At(run_);
}

void StepQueue::FinishRun(const absl::Status& status) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (status.ok()) {
    ++run_;
  } else {
    failure_ = status;
  }
  changed_.notify_all();
}

absl::StatusOr<const step::MaskBatch*> StepQueue::WaitForMasks() {
  std::unique_lock<std::mutex> lock(mutex_);
  const Entry& entry = At(run_);
  changed_.wait(lock, [&] { return stopped_ || entry.has_masks; });
  if (stopped_) return absl::CancelledError("the executor ends");
  return &entry.masks;
}

void StepQueue::Stop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  stopped_ = true;
  changed_.notify_all();
}

}  // namespace nibble::execution
