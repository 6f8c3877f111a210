#include "base/metric_families.h"

#include <limits>

#include "base/check.h"

namespace nibble {

prometheus::ClientMetric* MetricFamilies::Next(const MetricLabels& labels) {
  CHECK(!families_.empty());
  prometheus::ClientMetric& metric = families_.back().metric.emplace_back();
  metric.label = common_;
  metric.label.insert(metric.label.end(), labels.begin(), labels.end());
  return &metric;
}

void MetricFamilies::AddHistogram(const std::atomic<uint64_t>* buckets, const double* bounds,
                                  size_t count, double sum, const MetricLabels& labels) {
  prometheus::ClientMetric::Histogram& histogram = Next(labels)->histogram;
  uint64_t cumulative = 0;
  for (size_t i = 0; i <= count; ++i) {
    cumulative += buckets[i].load(std::memory_order_relaxed);
    histogram.bucket.push_back(
        {.cumulative_count = cumulative,
         .upper_bound = i < count ? bounds[i] : std::numeric_limits<double>::infinity()});
  }
  histogram.sample_count = cumulative;
  histogram.sample_sum = sum;
}

}  // namespace nibble
