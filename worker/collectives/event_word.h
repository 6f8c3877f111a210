// Waiting that spins for a moment and then sleeps on a futex, for threads and for processes that
// share memory. A pure spin costs milliseconds a round as soon as there are more waiting threads
// than cores; a pure sleep costs a wake-up even where the answer is a microsecond away.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <ctime>

#include "base/clock.h"

namespace nibble::collectives {

inline constexpr Duration kSpinMax = std::chrono::microseconds(20);

// 20 us where each of `waiting_threads` can have one of the cores that this process may run on,
// else zero.
[[nodiscard]] Duration SpinBudget(int32_t waiting_threads);

// A word that changes whenever a waited-for condition may have become true. May lie in memory
// shared by processes; all zero bytes is a valid start.
struct EventWord {
  std::atomic<uint32_t> value{0};
  std::atomic<uint32_t> sleepers{0};

  // Called after the condition was made true.
  void Signal() {
    value.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) != 0) WakeAll();
  }

  // Waits until ready() is true; false when `deadline` passed first. Spins at most `spin`.
  template <typename Ready>
  [[nodiscard]] bool Await(const Ready& ready, Duration spin, Deadline deadline) {
    if (ready()) return true;
    if (spin > Duration::zero() && Spin(ready, spin)) return true;
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    bool is_ready = false;
    for (;;) {
      const uint32_t seen = value.load(std::memory_order_seq_cst);
      is_ready = ready();
      if (is_ready) break;
      const Duration left = deadline - Now();
      if (left <= Duration::zero()) break;
      // Slices: a signal whose sender died between its two steps is still noticed.
      Sleep(seen, std::min<Duration>(left, std::chrono::milliseconds(100)));
    }
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
    return is_ready;
  }

 private:
  static Deadline Now() { return std::chrono::steady_clock::now(); }

  template <typename Ready>
  [[nodiscard]] static bool Spin(const Ready& ready, Duration spin) {
    const Deadline end = Now() + spin;
    do {
      for (int turn = 0; turn < 16; ++turn) {
        if (ready()) return true;
        __builtin_ia32_pause();
      }
    } while (Now() < end);
    return false;
  }

  void WakeAll() {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value), FUTEX_WAKE, INT32_MAX, nullptr, nullptr,
            0);
  }

  void Sleep(uint32_t seen, Duration time) {
    const auto ns = time.count();
    const timespec relative{.tv_sec = static_cast<time_t>(ns / 1'000'000'000),
                            .tv_nsec = static_cast<long>(ns % 1'000'000'000)};
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value), FUTEX_WAIT, seen, &relative, nullptr,
            0);
  }
};
static_assert(sizeof(std::atomic<uint32_t>) == 4 && std::atomic<uint32_t>::is_always_lock_free);

}  // namespace nibble::collectives
