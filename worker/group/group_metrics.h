// What a worker group exports to Prometheus, read from its shared statistics at every scrape.
// Names: docs/OPERATIONS.md.
#pragma once

#include <prometheus/collectable.h>

#include <cstdint>
#include <string>
#include <vector>

#include "base/clock.h"
#include "worker/group/group_control.h"
#include "worker/step/group_stats.h"

namespace nibble::group {

// Constant labels and facts.
struct GroupFacts {
  std::string model = {};
  std::string architecture = {};
  std::string quantization = {};  // "gemm", "none", ...
  int32_t group_size = 0;         // of the quantization; 0 = none
  int32_t tensor_parallel = 1;
  RankRange ranks = {};       // of this machine; count 0 = all
  std::string numerics = {};  // "fast", "exact"
  std::string head = {};      // "int8", "stored"
  int32_t max_context = 0;
  std::string device = "cpu";
};

// The engine's figures come from the machine that has the leader alone, each rank's from its own.
// Thread-safe: it only reads atomics. Both arguments are borrowed and outlive it.
class GroupMetrics final : public prometheus::Collectable {
 public:
  GroupMetrics(const step::GroupStats* stats, const Clock* clock, GroupFacts facts)
      : stats_(stats), clock_(clock), facts_(std::move(facts)) {}

  [[nodiscard]] std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  const step::GroupStats* stats_;
  const Clock* clock_;
  const GroupFacts facts_;
};

}  // namespace nibble::group
