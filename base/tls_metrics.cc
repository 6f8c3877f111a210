#include "base/tls_metrics.h"

#include <prometheus/metric_family.h>

namespace nibble {
namespace {

using prometheus::MetricType;

struct Family {
  prometheus::MetricFamily family;

  Family(const char* name, const char* help, MetricType type) {
    family.name = name;
    family.help = help;
    family.type = type;
  }
  void Add(const std::string& use, const char* label, const char* value, double number) {
    prometheus::ClientMetric& metric = family.metric.emplace_back();
    metric.label.push_back({"use", use});
    if (label != nullptr) metric.label.push_back({label, value});
    if (family.type == MetricType::Counter) {
      metric.counter.value = number;
    } else {
      metric.gauge.value = number;
    }
  }
};

bool InUse(const TlsStats& stats) {
  return stats.certificate_expires.Get() != 0 || stats.ca_expires.Get() != 0;
}

}  // namespace

std::vector<prometheus::MetricFamily> TlsMetrics::Collect() const {
  Family reloads("nibble_tls_reloads_total",
                 "Sets of TLS files that were read again: taken, or found not to hold.",
                 MetricType::Counter);
  Family stale("nibble_tls_files_stale",
               "1 while the TLS files do not hold and those before them are in use.",
               MetricType::Gauge);
  Family expires("nibble_tls_expiry_timestamp_seconds",
                 "When what is in use expires, in seconds of the Unix epoch.", MetricType::Gauge);
  for (const Use& one : uses_) {
    const TlsStats* const stats = one.stats;
    if (!InUse(*stats)) continue;
    const std::string& use = one.label;
    reloads.Add(use, "result", "ok", static_cast<double>(stats->reloads_ok.Get()));
    reloads.Add(use, "result", "failed", static_cast<double>(stats->reloads_failed.Get()));
    stale.Add(use, nullptr, nullptr, static_cast<double>(stats->stale.Get()));
    const auto expiry = [&](const char* file, const Gauge& when) {
      if (when.Get() != 0) expires.Add(use, "file", file, static_cast<double>(when.Get()));
    };
    expiry("certificate", stats->certificate_expires);
    expiry("ca", stats->ca_expires);
  }
  if (reloads.family.metric.empty()) return {};
  return {std::move(reloads.family), std::move(stale.family), std::move(expires.family)};
}

}  // namespace nibble
