// The only source of time. Timeouts, deadlines and ageing use monotonic time;
// the wall clock is for log lines alone.
#pragma once

#include <atomic>
#include <chrono>

namespace nibble {

using Duration = std::chrono::nanoseconds;
// A point on the monotonic clock. Deadline::max() means none.
using Deadline = std::chrono::time_point<std::chrono::steady_clock, Duration>;

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  [[nodiscard]] virtual Deadline Now() const = 0;
};

// std::chrono::steady_clock.
class SteadyClock final : public Clock {
 public:
  [[nodiscard]] Deadline Now() const override;
};

// A clock that moves only when told to, for tests and simulations.
class ManualClock final : public Clock {
 public:
  [[nodiscard]] Deadline Now() const override { return Deadline(Duration(now_ns_.load())); }
  void Advance(Duration step) { now_ns_.fetch_add(step.count()); }

 private:
  std::atomic<Duration::rep> now_ns_{0};
};

}  // namespace nibble
