// What a checkpoint is and how it would be held, as plain data: `nibble inspect` and `nibble plan`
// print these.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/weights/activation_plan.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/memory_plan.h"

namespace nibble::weights {

// Linear layers that are stored alike.
struct StorageSummary {
  Layout layout = Layout::kNone;  // kNone = dense
  int32_t group_size = 0;
  FloatType stored_type = FloatType::kF16;
  int32_t linear_count = 0;
  int64_t weight_count = 0;  // rows * columns, summed
};

// Consecutive decoder layers whose seven linear layers are stored alike.
struct LayerRun {
  int32_t first_layer = 0;
  int32_t last_layer = 0;
  std::vector<LinearInfo> linears;  // in the order of kLinearRoles
};

// How the matrices split over that many ranks.
struct DegreeSummary {
  int32_t rank_count = 0;
  absl::Status possible;       // OK, or why not
  bool even = false;           // every rank holds as many heads, KV heads, FFN columns and tokens
  bool kv_replicated = false;  // more ranks than KV heads
  std::vector<int64_t> weight_bytes;  // per rank
};

struct FileSummary {
  std::string name;
  int64_t tensor_count = 0;
  int64_t tensor_bytes = 0;
};

struct CheckpointReport {
  std::vector<FileSummary> files;
  std::vector<StorageSummary> storage;  // most weights first; without the head
  std::vector<LayerRun> layers;
  LinearInfo head;
  FloatType embedding_type = FloatType::kF16;
  int64_t parameter_count = 0;  // of the decoder: linears, embedding, untied head, norms, biases
  int64_t stored_bytes = 0;     // of all tensors
  std::vector<DegreeSummary> degrees;
};

// Checks every tensor of the decoder on the way. Degrees 1 … min(degrees_max, query heads).
[[nodiscard]] absl::StatusOr<CheckpointReport> InspectCheckpoint(const Checkpoint& checkpoint,
                                                                 const MemoryOptions& options,
                                                                 int32_t degrees_max);

struct PlanReport {
  MemoryPlan plan;
  std::vector<ActivationPlan> activations;  // per rank
  int32_t sequence_blocks = 0;              // KV blocks of one sequence of max_context
  int32_t sequences = 0;                    // how many of those fit at once, at most max_slots
};

[[nodiscard]] absl::StatusOr<PlanReport> ReportPlan(const Checkpoint& checkpoint,
                                                    int32_t rank_count,
                                                    const MemoryOptions& options);

}  // namespace nibble::weights
