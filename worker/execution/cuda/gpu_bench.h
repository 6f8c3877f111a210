// Measures the GPU executor in this process and, with several ranks, in forks of it. What
// `nibble bench --device cuda` prints.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/execution/cpu/measure.h"
#include "worker/execution/cuda/gpu_rank.h"

namespace nibble::execution {

struct GpuBenchOptions {
  int32_t ranks = 1;
  bool fusion = true;
  int32_t max_step_tokens = 2048;
  std::vector<int32_t> decode_batches = {1, 8};
  std::vector<int32_t> decode_depths = {128};
  int32_t decode_tokens = 127;  // steps of each run
  std::vector<int32_t> prefill_lengths = {512, 2048};
  int32_t runs = 3;
  // Called before each measurement with what is measured; may be empty.
  std::function<void(const std::string& what)> progress = {};
};

struct GpuBenchResult {
  GpuInfo gpu = {};  // rank 0's
  int32_t ranks = 0;
  int32_t runs = 0;
  bool fusion = true;
  double load_seconds = 0;
  GpuMemoryUse memory = {};              // rank 0's
  weights::RankMemoryPlan planned = {};  // rank 0's
  std::vector<DecodeFigures> decode = {};
  std::vector<PrefillFigures> prefill = {};
};

// INVALID_ARGUMENT for lengths beyond the model's context, else the errors of gpu_rank.h. With
// several ranks REQUIRES that this process has no other thread and has not touched a GPU.
[[nodiscard]] absl::StatusOr<GpuBenchResult> RunGpuBench(const GpuModelSource& source,
                                                         const GpuBenchOptions& options);

}  // namespace nibble::execution
