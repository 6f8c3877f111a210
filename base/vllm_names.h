// Metrics under vLLM's names beside our own, for boards, autoscalers and routers that know those
// alone. Which, and from what: docs/OPERATIONS.md.
#pragma once

#include <prometheus/metric_family.h>

#include <vector>

namespace nibble {

// The families that `own` has a figure for, labelled model_name and engine as vLLM does; series
// that differ in labels that vLLM does not have are added up.
[[nodiscard]] std::vector<prometheus::MetricFamily> VllmFamilies(
    const std::vector<prometheus::MetricFamily>& own);

}  // namespace nibble
