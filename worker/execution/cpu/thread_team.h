// The compute threads of one rank: all run the same function side by side, with barriers between
// its stages.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "kernels/cpu/kernels.h"
#include "worker/collectives/event_word.h"

namespace nibble::execution {

class ThreadTeam {
 public:
  // What the threads do together; called once on each thread.
  class Task {
   public:
    virtual ~Task() = default;
    virtual void RunThread(int32_t thread) = 0;
  };

  // Starts threads - 1 helpers; thread 0 is whoever calls Run. Waits spin for at most `spin`.
  ThreadTeam(int32_t threads, Duration spin);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  [[nodiscard]] int32_t threads() const { return threads_; }

  // Runs the task on every thread; returns when all are done. One caller at a time.
  void Run(Task* task);

  // Inside a task: returns when every thread has called it equally often.
  void Barrier(int32_t thread);

 private:
  void HelperLoop(int32_t thread);

  const int32_t threads_;
  const Duration spin_;
  // Helpers wait for start_round_ to rise; set stop_ first to end them.
  alignas(64) std::atomic<uint64_t> start_round_{0};
  collectives::EventWord start_event_;
  Task* task_ = nullptr;
  bool stop_ = false;
  // The arrival that makes it round * threads completes the round.
  alignas(64) std::atomic<uint64_t> arrivals_{0};
  alignas(64) std::atomic<uint64_t> completed_{0};
  collectives::EventWord barrier_event_;
  struct alignas(64) PerThread {
    uint64_t round = 0;
  };
  std::vector<PerThread> per_thread_;
  std::vector<std::thread> helpers_;
};

// Thread `thread`'s even share of [0, count).
[[nodiscard]] inline cpu::BlockRange ShareOf(int32_t count, int32_t thread, int32_t threads) {
  const auto at = [&](int32_t index) {
    return static_cast<int32_t>(static_cast<int64_t>(count) * index / threads);
  };
  return {at(thread), at(thread + 1)};
}

}  // namespace nibble::execution
