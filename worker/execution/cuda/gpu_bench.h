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
  // Rank 0's share of so many ranks, alone on one GPU: sums get their peers' parts from this rank
  // itself (GpuGroup::Echo). Links between GPUs are left out, and so are NCCL's sums and gathers.
  // With more than one rank only.
  bool one_rank = false;
  bool fusion = true;
  Activations activations = Activations::kAuto;
  int32_t max_step_tokens = 2048;
  std::vector<int32_t> decode_batches = {1, 8};
  std::vector<int32_t> decode_depths = {128};
  int32_t decode_tokens = 127;  // steps of each run
  std::vector<int32_t> prefill_lengths = {512, 2048};
  int32_t runs = 3;
  // Batches, at the first depth, whose operations are timed one by one; and prompt lengths, those
  // within a step.
  std::vector<int32_t> timed_batches = {};
  std::vector<int32_t> timed_prompts = {};
  // Called before each measurement with what is measured; may be empty.
  std::function<void(const std::string& what)> progress = {};
};

// The operations of one kind of step.
struct OperationTable {
  int32_t batch = 0;   // 0: of a prompt
  int32_t prompt = 0;  // tokens of the prompt, or before the step
  std::vector<OperationTime> operations = {};
};

struct GpuBenchResult {
  GpuInfo gpu = {};  // rank 0's
  int32_t ranks = 0;
  bool one_rank = false;  // times of rank 0's share alone, not of `ranks` GPUs
  int32_t runs = 0;
  bool fusion = true;
  cuda::Element element = cuda::Element::kHalf;
  // What there was room for.
  int32_t slots = 0;
  int32_t positions = 0;  // of KV blocks, all sequences together
  int32_t max_step_tokens = 0;
  double load_seconds = 0;
  GpuMemoryUse memory = {};              // rank 0's
  weights::RankMemoryPlan planned = {};  // rank 0's
  std::vector<DecodeFigures> decode = {};
  std::vector<PrefillFigures> prefill = {};
  double read_bandwidth = 0;  // bytes a second, where operations were timed
  std::vector<OperationTable> operations = {};
};

// INVALID_ARGUMENT for lengths beyond the model's context, else the errors of gpu_rank.h. With
// several ranks REQUIRES that this process has no other thread and has not touched a GPU.
[[nodiscard]] absl::StatusOr<GpuBenchResult> RunGpuBench(const GpuModelSource& source,
                                                         const GpuBenchOptions& options);

}  // namespace nibble::execution
