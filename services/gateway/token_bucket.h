// A quota of tokens that fills up with time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/clock.h"

namespace nibble::gateway {

// Holds a minute's worth at most and may be overdrawn: what a request will generate is not known
// when it begins, so it may begin while anything is left, and what it takes more is paid off before
// the next one. Over any time, then, no more than rate * time + a minute's worth + what was in
// flight. Thread-compatible.
class TokenBucket {
 public:
  // Full. 0 a minute: no bound.
  TokenBucket(int64_t per_minute, Deadline now)
      : per_minute_(static_cast<double>(per_minute)), level_(per_minute_), at_(now) {}

  // What was used stays used.
  void SetRate(int64_t per_minute, Deadline now) {
    Fill(now);
    const double used = per_minute_ - level_;
    per_minute_ = static_cast<double>(per_minute);
    level_ = per_minute_ - used;
  }

  // Zero where something is left; else how long until then.
  [[nodiscard]] Duration Wait(Deadline now) {
    Fill(now);
    if (per_minute_ == 0 || level_ > 0) return Duration::zero();
    const double minutes = (1 - level_) / per_minute_;
    return std::chrono::duration_cast<Duration>(std::chrono::duration<double>(60 * minutes));
  }

  void Take(uint64_t tokens, Deadline now) {
    if (per_minute_ == 0) return;
    Fill(now);
    level_ -= static_cast<double>(tokens);
  }

 private:
  void Fill(Deadline now) {
    const double minutes = std::chrono::duration<double>(now - at_).count() / 60;
    level_ = std::min(per_minute_, level_ + per_minute_ * std::max(minutes, 0.0));
    at_ = std::max(at_, now);
  }

  double per_minute_;
  double level_;
  Deadline at_;
};

}  // namespace nibble::gateway
