#include "worker/execution/cpu/thread_team.h"

#include "base/check.h"

namespace nibble::execution {

ThreadTeam::ThreadTeam(int32_t threads, Duration spin)
    : threads_(threads), spin_(spin), per_thread_(static_cast<size_t>(threads)) {
  CHECK(threads >= 1);
  for (int32_t thread = 1; thread < threads; ++thread) {
    helpers_.emplace_back([this, thread] { HelperLoop(thread); });
  }
}

ThreadTeam::~ThreadTeam() {
  stop_ = true;
  start_round_.fetch_add(1, std::memory_order_release);
  start_event_.Signal();
  for (std::thread& helper : helpers_) helper.join();
}

void ThreadTeam::Run(Task* task) {
  if (threads_ > 1) {
    task_ = task;
    start_round_.fetch_add(1, std::memory_order_release);
    start_event_.Signal();
  }
  task->RunThread(0);
  Barrier(0);
}

void ThreadTeam::HelperLoop(int32_t thread) {
  for (uint64_t round = 1;; ++round) {
    const auto started = [&] { return start_round_.load(std::memory_order_acquire) >= round; };
    while (!start_event_.Await(started, spin_, Deadline::max())) {
    }
    if (stop_) return;
    task_->RunThread(thread);
    Barrier(thread);
  }
}

void ThreadTeam::Barrier(int32_t thread) {
  if (threads_ == 1) return;
  const uint64_t round = ++per_thread_[static_cast<size_t>(thread)].round;
  const uint64_t arrivals = arrivals_.fetch_add(1, std::memory_order_acq_rel) + 1;
  if (arrivals == round * static_cast<uint64_t>(threads_)) {
    completed_.store(round, std::memory_order_release);
    barrier_event_.Signal();
    return;
  }
  const auto complete = [&] { return completed_.load(std::memory_order_acquire) >= round; };
  while (!barrier_event_.Await(complete, spin_, Deadline::max())) {
  }
}

}  // namespace nibble::execution
