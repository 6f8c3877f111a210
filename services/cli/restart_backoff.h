// How long to wait before a process that ended is started again.
#pragma once

#include <algorithm>
#include <chrono>

#include "base/clock.h"

namespace nibble::cli {

// 1, 2, 4 … 30 s; from the start again after a run of a minute. Pure; one thread.
class RestartBackoff {
 public:
  // `ran`: how long it lived this time.
  [[nodiscard]] Duration Next(Duration ran) {
    if (ran >= kHealthyRun) next_ = kFirst;
    const Duration wait = next_;
    next_ = std::min(next_ * 2, kLongest);
    return wait;
  }

 private:
  static constexpr Duration kFirst = std::chrono::seconds(1);
  static constexpr Duration kLongest = std::chrono::seconds(30);
  static constexpr Duration kHealthyRun = std::chrono::minutes(1);

  Duration next_ = kFirst;
};

}  // namespace nibble::cli
