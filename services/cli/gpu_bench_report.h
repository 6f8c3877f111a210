// The figures of a bench on GPUs as text for people and as records for programs.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "worker/execution/cuda/gpu_bench.h"

namespace nibble::cli {

[[nodiscard]] std::string GpuBenchTable(const execution::GpuBenchResult& result);

// What nvidia-smi says of GPU `ordinal`; empty where it says nothing.
struct GpuState {
  std::string driver;
  std::string sm_clock;
  std::string memory_clock;
};
[[nodiscard]] GpuState AskNvidiaSmi(int32_t ordinal);

// A header {record, model, gpu, driver, cuda, clocks, commit, command}, then records {metric,
// value, tp, batch, prompt, depth, fusion, kv_bits, runs, spread}; spread is a share of the value.
[[nodiscard]] nlohmann::ordered_json GpuBenchRecords(const execution::GpuBenchResult& result,
                                                     const std::string& model,
                                                     const std::string& command,
                                                     const GpuState& state);

}  // namespace nibble::cli
