#include "base/clock.h"

namespace nibble {

Deadline SteadyClock::Now() const { return std::chrono::steady_clock::now(); }

}  // namespace nibble
