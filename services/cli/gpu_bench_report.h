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

// All that a rank holds, without the driver's context.
[[nodiscard]] int64_t DeviceBytes(const execution::GpuMemoryUse& use);

// {record: "header", model, gpu, driver, cuda, clocks, commit, command}: what holds for the records
// behind it.
[[nodiscard]] nlohmann::ordered_json GpuBenchHeader(const execution::GpuBenchResult& result,
                                                    const std::string& model,
                                                    const std::string& command,
                                                    const GpuState& state);

// Appends records {metric, value, tp, batch, prompt, depth, fusion, kv_bits, runs, spread}; spread
// is a share of the value. Where one rank's share was timed alone, every metric's name begins with
// "one_rank_". device_bytes and planned_bytes have an owner, operation_us has an
// operation with its calls, bytes and flops in a step.
void AddGpuBenchRecords(const execution::GpuBenchResult& result, nlohmann::ordered_json* records);

}  // namespace nibble::cli
