// A call's deadline on our own clock.
#pragma once

#include <grpc/support/time.h>

#include <cstdint>

#include "base/clock.h"

namespace nibble {

// What is left of ServerContext::raw_deadline() counted from clock.Now(); max() where there is
// none.
[[nodiscard]] inline Deadline FromGrpcDeadline(gpr_timespec raw, const Clock& clock) {
  if (gpr_time_cmp(raw, gpr_inf_future(raw.clock_type)) == 0) return Deadline::max();
  const gpr_timespec left = gpr_time_sub(raw, gpr_now(raw.clock_type));
  constexpr int64_t kSecondsMax = int64_t{10} * 365 * 24 * 3600;  // beyond it: no deadline
  if (left.tv_sec > kSecondsMax) return Deadline::max();
  if (left.tv_sec < -kSecondsMax) return Deadline::min();
  return clock.Now() + std::chrono::seconds(left.tv_sec) + std::chrono::nanoseconds(left.tv_nsec);
}

}  // namespace nibble
