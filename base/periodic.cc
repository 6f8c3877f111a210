#include "base/periodic.h"

#include <utility>

namespace nibble {

Periodic::Periodic(Duration every, std::function<void()> work)
    : thread_([this, every, work = std::move(work)] { Run(every, work); }) {}

Periodic::~Periodic() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_.notify_all();
  thread_.join();
}

void Periodic::Run(Duration every, const std::function<void()>& work) {
  std::unique_lock lock(mutex_);
  while (!stop_.wait_for(lock, every, [this] { return stopping_; })) {
    lock.unlock();
    work();
    lock.lock();
  }
}

}  // namespace nibble
