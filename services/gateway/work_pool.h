// A few threads for work that is too long for gRPC's: encoding texts, rendering templates.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace nibble::gateway {

// Thread-safe. Tasks run in the order in which they came.
class WorkPool {
 public:
  struct Options {
    int threads = 2;
    size_t queue_tasks = 256;
    size_t queue_bytes = 64 << 20;
  };
  explicit WorkPool(const Options& options);
  ~WorkPool();  // runs what is queued, then joins
  WorkPool(const WorkPool&) = delete;
  WorkPool& operator=(const WorkPool&) = delete;

  // False when the queue is full, by count or by `bytes` (what the task holds in memory). The task
  // is then not run.
  [[nodiscard]] bool Submit(size_t bytes, std::function<void()> task);
  [[nodiscard]] size_t depth() const;

 private:
  struct Task {
    size_t bytes;
    std::function<void()> run;
  };
  void Run();
  [[nodiscard]] bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return stopping_ || !tasks_.empty();
  }

  const Options options_;
  mutable absl::Mutex mutex_;
  std::deque<Task> tasks_ ABSL_GUARDED_BY(mutex_);
  size_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace nibble::gateway
