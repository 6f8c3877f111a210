// The benchmark of fused AWQ modules that the transformers documentation publishes, on this
// machine: Mistral-7B, one sequence, prompts of 32 to 2048 tokens and as many generated ones, with
// and without fusion.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "worker/execution/cuda/gpu_bench.h"

namespace nibble::cli {

[[nodiscard]] std::vector<int32_t> FusionTableLengths();

// What runs one line: a model of its own, with room for no more than the line needs.
[[nodiscard]] execution::GpuBenchOptions FusionTableOptions(
    int32_t length, bool fusion, const execution::GpuBenchOptions& options);

// Lines by mode, each beside the published one. Memory is the device's, without the context.
[[nodiscard]] std::string FusionTable(std::span<const execution::GpuBenchResult> lines);

// The published figures as records, beside which those of AddGpuBenchRecords stand.
void AddPublishedRecords(nlohmann::ordered_json* records);

}  // namespace nibble::cli
