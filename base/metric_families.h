// Makes metric families out of plain statistics.
#pragma once

#include <prometheus/metric_family.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/stats.h"

namespace nibble {

using MetricLabels = std::vector<prometheus::ClientMetric::Label>;

// Families in the order in which they are begun. One thread.
class MetricFamilies {
 public:
  // Labels that every metric carries before its own.
  explicit MetricFamilies(MetricLabels common) : common_(std::move(common)) {}

  // What is added from here on belongs to this family.
  void Begin(std::string name, std::string help, prometheus::MetricType type) {
    families_.push_back(
        {.name = std::move(name), .help = std::move(help), .type = type, .metric = {}});
  }

  void Add(const Gauge& gauge, const MetricLabels& labels = {}) {
    AddGauge(static_cast<double>(gauge.Get()), labels);
  }
  void AddGauge(double value, const MetricLabels& labels = {}) {
    Next(labels)->gauge.value = value;
  }
  void Add(const Counter& counter, const MetricLabels& labels = {}) {
    AddCounter(static_cast<double>(counter.Get()), labels);
  }
  void AddCounter(double value, const MetricLabels& labels = {}) {
    Next(labels)->counter.value = value;
  }

  // The buckets are read once and the count is their sum, so that the two agree while others
  // write.
  template <size_t kBuckets>
  void Add(const Histogram<kBuckets>& histogram, const std::array<double, kBuckets>& bounds,
           const MetricLabels& labels = {}) {
    AddHistogram(histogram.buckets.data(), bounds.data(), kBuckets,
                 histogram.sum.load(std::memory_order_relaxed), labels);
  }

  [[nodiscard]] std::vector<prometheus::MetricFamily> Take() { return std::move(families_); }

 private:
  prometheus::ClientMetric* Next(const MetricLabels& labels);
  void AddHistogram(const std::atomic<uint64_t>* buckets, const double* bounds, size_t count,
                    double sum, const MetricLabels& labels);

  const MetricLabels common_;
  std::vector<prometheus::MetricFamily> families_;
};

}  // namespace nibble
