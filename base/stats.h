// Counters, gauges and histograms as plain atomics that may live in shared memory: ranks write
// them, the supervisor of the machine exports them. All zero bytes is a valid start.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace nibble {

struct Counter {
  std::atomic<uint64_t> value{0};
  void Add(uint64_t amount = 1) { value.fetch_add(amount, std::memory_order_relaxed); }
  [[nodiscard]] uint64_t Get() const { return value.load(std::memory_order_relaxed); }
};

struct Gauge {
  std::atomic<int64_t> value{0};
  void Set(int64_t now) { value.store(now, std::memory_order_relaxed); }
  void Add(int64_t amount) { value.fetch_add(amount, std::memory_order_relaxed); }
  [[nodiscard]] int64_t Get() const { return value.load(std::memory_order_relaxed); }
};

// Cumulative buckets are made at export; `bounds` are upper bounds in seconds (or tokens) and
// belong to the reader and the writer alike, hence a template over a constant.
template <size_t kBuckets>
struct Histogram {
  std::array<std::atomic<uint64_t>, kBuckets + 1> buckets{};  // the last one is +Inf
  std::atomic<uint64_t> count{0};
  std::atomic<double> sum{0};

  void Observe(const std::array<double, kBuckets>& bounds, double value) {
    size_t index = 0;
    while (index < kBuckets && value > bounds[index]) ++index;
    buckets[index].fetch_add(1, std::memory_order_relaxed);
    count.fetch_add(1, std::memory_order_relaxed);
    sum.fetch_add(value, std::memory_order_relaxed);
  }
};

}  // namespace nibble
