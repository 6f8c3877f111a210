// Bytes of every allocation of a rank, from headers alone and before anything is loaded.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/shard.h"

namespace nibble::weights {

enum class Numerics : uint8_t { kFast, kExact };
enum class HeadFormat : uint8_t { kInt8, kStored };

// What the CPU executor allocates depends on these and on the checkpoint only.
struct MemoryOptions {
  Numerics numerics = Numerics::kFast;
  HeadFormat head = HeadFormat::kInt8;  // kInt8 applies to a dense fp16/bf16 head in kFast only
  int32_t max_slots = 64;
  int32_t max_step_tokens = 512;
  int32_t max_context = 0;   // 0 = the model's
  int64_t memory_bytes = 0;  // budget of one rank; 0 = what max_slots sequences of max_context need, capped
  int32_t kv_blocks = 0;     // 0 = what the budget leaves
};

struct RankMemoryPlan {
  RankShare share;
  int64_t weight_bytes = 0;
  int64_t kv_block_bytes = 0;  // one block of kBlockTokens positions, all layers, K and V
  int64_t activation_bytes = 0;
  int64_t workspace_bytes = 0;  // logits, sampling and penalty state
  int32_t kv_blocks = 0;
  [[nodiscard]] int64_t total_bytes() const {
    return weight_bytes + activation_bytes + workspace_bytes +
           static_cast<int64_t>(kv_blocks) * kv_block_bytes;
  }
};

struct MemoryPlan {
  std::vector<RankMemoryPlan> ranks;
  int32_t kv_blocks = 0;  // the smallest rank's
};

// RESOURCE_EXHAUSTED with the numbers when the budget does not hold the weights and one sequence
// of max_context.
[[nodiscard]] absl::StatusOr<MemoryPlan> PlanMemory(const Checkpoint& checkpoint,
                                                    int32_t rank_count,
                                                    const MemoryOptions& options);

}  // namespace nibble::weights
