// TLS files for Prometheus. Names: docs/OPERATIONS.md.
#pragma once

#include <prometheus/collectable.h>

#include <string>
#include <utility>
#include <vector>

#include "base/tls_stats.h"

namespace nibble {

// Thread-safe: it only reads atomics. Whoever has no TLS has no series.
class TlsMetrics final : public prometheus::Collectable {
 public:
  struct Use {
    std::string label;      // "listen", "groups", "machines"
    const TlsStats* stats;  // borrowed
  };
  explicit TlsMetrics(std::vector<Use> uses) : uses_(std::move(uses)) {}

  [[nodiscard]] std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const std::vector<Use> uses_;
};

}  // namespace nibble
