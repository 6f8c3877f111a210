// A few threads for work that is too long for gRPC's: encoding texts, rendering templates.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

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

  const Options options_;
  // Of the standard library: the thread sanitizer cannot see into the distribution's abseil.
  mutable std::mutex mutex_;
  std::condition_variable has_work_;
  std::deque<Task> tasks_;  // guarded by mutex_, as what follows
  size_t bytes_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace nibble::gateway
