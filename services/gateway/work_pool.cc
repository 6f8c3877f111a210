#include "services/gateway/work_pool.h"

#include <utility>

namespace nibble::gateway {

WorkPool::WorkPool(const Options& options) : options_(options) {
  for (int i = 0; i < options.threads; ++i) threads_.emplace_back([this] { Run(); });
}

WorkPool::~WorkPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  has_work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool WorkPool::Submit(size_t bytes, std::function<void()> task) {
  const std::lock_guard lock(mutex_);
  if (stopping_ || tasks_.size() >= options_.queue_tasks) return false;
  // One task larger than the bound may run alone; the message limit bounds its size.
  if (!tasks_.empty() && bytes_ + bytes > options_.queue_bytes) return false;
  bytes_ += bytes;
  tasks_.push_back({bytes, std::move(task)});
  has_work_.notify_one();
  return true;
}

size_t WorkPool::depth() const {
  const std::lock_guard lock(mutex_);
  return tasks_.size();
}

void WorkPool::Run() {
  while (true) {
    Task task;
    {
      std::unique_lock lock(mutex_);
      has_work_.wait(lock, [this] { return stopping_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
      bytes_ -= task.bytes;
    }
    task.run();
  }
}

}  // namespace nibble::gateway
