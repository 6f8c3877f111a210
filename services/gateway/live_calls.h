// The calls in flight: their number is the concurrency limit, and draining waits for them.
#pragma once

#include <atomic>
#include <cstddef>
#include <unordered_set>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "base/clock.h"

namespace nibble::gateway {

class LiveCall {
 public:
  virtual ~LiveCall() = default;
  // Called now and then, from the gateway's ticker: the place to notice a reader that stalls.
  virtual void Sweep(Deadline now) = 0;
  // The call has to end now with this status.
  virtual void Cut(const absl::Status& status) = 0;
};

// Thread-safe. Sweep and Cut of a call are never running when its Leave returns.
class LiveCalls {
 public:
  explicit LiveCalls(size_t limit) : limit_(limit) {}

  // False when the limit is reached: the call did not enter and owes no Leave.
  [[nodiscard]] bool Enter(LiveCall* call) {
    absl::MutexLock lock(&mutex_);
    if (calls_.size() >= limit_) return false;
    calls_.insert(call);
    size_.store(calls_.size(), std::memory_order_relaxed);
    return true;
  }
  void Leave(LiveCall* call) {
    absl::MutexLock lock(&mutex_);
    calls_.erase(call);
    size_.store(calls_.size(), std::memory_order_relaxed);
  }

  void SweepAll(Deadline now) {
    absl::MutexLock lock(&mutex_);
    for (LiveCall* call : calls_) call->Sweep(now);
  }
  void CutAll(const absl::Status& status) {
    absl::MutexLock lock(&mutex_);
    for (LiveCall* call : calls_) call->Cut(status);
  }

  [[nodiscard]] size_t size() const { return size_.load(std::memory_order_relaxed); }
  [[nodiscard]] size_t limit() const { return limit_; }

 private:
  const size_t limit_;
  absl::Mutex mutex_;
  std::unordered_set<LiveCall*> calls_ ABSL_GUARDED_BY(mutex_);
  std::atomic<size_t> size_{0};
};

// Counts things that must be gone before what they use is: streams to worker groups. Thread-safe.
class LiveCount {
 public:
  void Enter() {
    absl::MutexLock lock(&mutex_);
    ++count_;
  }
  void Leave() {
    absl::MutexLock lock(&mutex_);
    --count_;
  }
  void WaitForNone() {
    absl::MutexLock lock(&mutex_);
    mutex_.Await(absl::Condition(this, &LiveCount::IsNone));
  }
  [[nodiscard]] int64_t count() const {
    absl::MutexLock lock(&mutex_);
    return count_;
  }

 private:
  [[nodiscard]] bool IsNone() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return count_ == 0; }

  mutable absl::Mutex mutex_;
  int64_t count_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace nibble::gateway
