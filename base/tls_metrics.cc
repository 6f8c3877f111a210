#include "base/tls_metrics.h"

#include <prometheus/metric_family.h>

#include <algorithm>
#include <iterator>

#include "base/metric_families.h"

namespace nibble {
namespace {

using prometheus::MetricType;

bool InUse(const TlsStats& stats) {
  return stats.certificate_expires.Get() != 0 || stats.ca_expires.Get() != 0;
}

}  // namespace

std::vector<prometheus::MetricFamily> TlsMetrics::Collect() const {
  std::vector<Use> uses;
  std::copy_if(uses_.begin(), uses_.end(), std::back_inserter(uses),
               [](const Use& use) { return InUse(*use.stats); });
  if (uses.empty()) return {};
  MetricFamilies families({});
  families.Begin("nibble_tls_reloads_total",
                 "Sets of TLS files that were read again: taken, or found not to hold.",
                 MetricType::Counter);
  for (const Use& use : uses) {
    families.Add(use.stats->reloads_ok, {{"use", use.label}, {"result", "ok"}});
    families.Add(use.stats->reloads_failed, {{"use", use.label}, {"result", "failed"}});
  }
  families.Begin("nibble_tls_files_stale",
                 "1 while the TLS files do not hold and those before them are in use.",
                 MetricType::Gauge);
  for (const Use& use : uses) families.Add(use.stats->stale, {{"use", use.label}});
  families.Begin("nibble_tls_expiry_timestamp_seconds",
                 "When what is in use expires, in seconds of the Unix epoch.", MetricType::Gauge);
  for (const Use& use : uses) {
    const auto expiry = [&](const char* file, const Gauge& when) {
      if (when.Get() != 0) families.Add(when, {{"use", use.label}, {"file", file}});
    };
    expiry("certificate", use.stats->certificate_expires);
    expiry("ca", use.stats->ca_expires);
  }
  return families.Take();
}

}  // namespace nibble
