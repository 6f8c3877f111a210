// Work that a thread of its own does every so often.
#pragma once

#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "base/clock.h"

namespace nibble {

class Periodic {
 public:
  // `work` is called first after `every`, then again so long after its last call has returned.
  Periodic(Duration every, std::function<void()> work);
  // Waits for a call under way. None comes after. Whoever owns what `work` touches declares this
  // last.
  ~Periodic();
  Periodic(const Periodic&) = delete;
  Periodic& operator=(const Periodic&) = delete;

 private:
  void Run(Duration every, const std::function<void()>& work);

  std::mutex mutex_;
  std::condition_variable stop_;
  bool stopping_ = false;  // guarded by mutex_
  std::thread thread_;
};

}  // namespace nibble
