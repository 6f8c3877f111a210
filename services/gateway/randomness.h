// What the gateway draws: seeds and ids that clients left open, jitter.
#pragma once

#include <cstdint>
#include <random>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "base/clock.h"

namespace nibble::gateway {

// Thread-safe. Not for secrets.
class Randomness {
 public:
  Randomness() : engine_(std::random_device{}()) {}
  explicit Randomness(uint64_t seed) : engine_(seed) {}

  [[nodiscard]] uint64_t Next() {
    absl::MutexLock lock(&mutex_);
    return engine_();
  }
  [[nodiscard]] std::string NextId() { return absl::StrFormat("%016x", Next()); }
  [[nodiscard]] Duration Between(Duration low, Duration high) {
    const auto span = static_cast<uint64_t>((high - low).count()) + 1;
    return low + Duration(static_cast<Duration::rep>(Next() % span));
  }

 private:
  absl::Mutex mutex_;
  std::mt19937_64 engine_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace nibble::gateway
