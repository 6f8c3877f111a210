// How many attempts may be second ones.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace nibble::gateway {

// At most a fifth of the active requests, and at least three, run their second attempt at a time:
// when a group dies under load, the others are not flooded. Thread-safe.
class RetryBudget {
 public:
  // True: the caller owes one Return().
  [[nodiscard]] bool TryTake(int64_t active_requests) {
    const int64_t allowed = std::max<int64_t>(kAtLeast, active_requests / kShare);
    int64_t taken = taken_.load();
    while (taken < allowed) {
      if (taken_.compare_exchange_weak(taken, taken + 1)) return true;
    }
    return false;
  }
  void Return() { taken_.fetch_sub(1); }
  [[nodiscard]] int64_t taken() const { return taken_.load(); }

 private:
  static constexpr int64_t kAtLeast = 3;
  static constexpr int64_t kShare = 5;
  std::atomic<int64_t> taken_{0};
};

}  // namespace nibble::gateway
