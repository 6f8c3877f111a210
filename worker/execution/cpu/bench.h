// Measures an executor in this process: decode and prefill throughput, time to the first token.
// What `nibble bench` prints.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/kernels.h"
#include "worker/execution/cpu/cpu_executor.h"
#include "worker/execution/cpu/measure.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/memory_plan.h"

namespace nibble::execution {

struct BenchOptions {
  int32_t ranks = 1;
  int32_t threads = 1;  // of each rank
  cpu::IsaLevel isa = cpu::BestIsaLevel();
  weights::Numerics numerics = weights::Numerics::kFast;
  weights::HeadFormat head = weights::HeadFormat::kInt8;
  std::vector<int32_t> decode_batches = {1, 4, 16};
  int32_t decode_context = 32;  // prompt tokens before each decode run
  int32_t decode_tokens = 64;   // of each sequence and run
  std::vector<int32_t> prefill_lengths = {128, 512};
  int32_t runs = 3;  // each figure is the median of so many
  // Called before each measurement with what is measured; may be empty.
  std::function<void(const std::string& what)> progress = {};
};

struct BenchResult {
  std::string isa;
  int32_t ranks = 0;
  int32_t threads = 0;
  int32_t runs = 0;
  double load_seconds = 0;
  MemoryUse memory = {};          // of all ranks
  int64_t peak_memory_bytes = 0;  // resident, of the process
  std::vector<DecodeFigures> decode = {};
  std::vector<PrefillFigures> prefill = {};
};

// INVALID_ARGUMENT for lengths beyond the model's context. Uses two steps in flight, as a server;
// before each figure a prompt runs untimed.
[[nodiscard]] absl::StatusOr<BenchResult> RunBench(const weights::Checkpoint& checkpoint,
                                                   const BenchOptions& options);

}  // namespace nibble::execution
