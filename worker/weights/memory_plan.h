// Bytes of every allocation of a rank, from headers alone and before anything is loaded.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/rank_weights.h"
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
  int32_t threads = 1;       // compute threads of the rank: each has some buffers of its own
  int32_t max_context = 0;   // 0 = the model's
  int64_t memory_bytes = 0;  // budget of one rank; 0 = none: see PlanMemory
  int32_t kv_blocks = 0;     // 0 = what the budget leaves
};

struct RankMemoryPlan {
  RankShare share;
  int64_t weight_bytes = 0;  // the four below
  int64_t embedding_bytes = 0;
  int64_t layer_bytes = 0;
  int64_t head_bytes = 0;
  int64_t rope_bytes = 0;
  int64_t kv_block_bytes = 0;  // one block of kBlockTokens positions, all layers, K and V
  int64_t activation_bytes = 0;
  int64_t workspace_bytes = 0;  // logits, sampling and penalty state
  int64_t graph_bytes = 0;      // GPUs: graphs and what libraries take, from measurements
  int32_t kv_blocks = 0;
  [[nodiscard]] int64_t total_bytes() const {
    return weight_bytes + activation_bytes + workspace_bytes + graph_bytes +
           static_cast<int64_t>(kv_blocks) * kv_block_bytes;
  }
};

struct MemoryPlan {
  std::vector<RankMemoryPlan> ranks;
  int32_t kv_blocks = 0;    // the smallest rank's
  int32_t max_context = 0;  // positions of one sequence: the option, or the model's
  MemoryOptions options;    // as given
};

// What a rank allocates, piece by piece; each piece's bytes are rounded up to 64 (AlignedBytes).
//
// Weights:
//   embedding  [vocab share, hidden] in its stored type, row-major
//   final norm [hidden] fp32
//   per layer  PackedBytes of the four matrices of DescribeLayer (rank_weights.h), and each norm
//              of LayerNorms (linear_shapes.h) in fp32
//   head       PackedBytes of HeadPackedFormat; a tied head is packed beside the embedding
//   rope       cos and sin, each [max_context, head_dim / 2] fp32
// KV cache, per layer: keys and values, each
//   [kv_blocks][kv_heads][kBlockTokens][head_dim] in kF16 (fast) or kF32 (exact).
// Activations and workspace: activation_plan.h.

// kInt8 in fast mode with HeadFormat::kInt8 for a dense fp16 or bf16 head whose columns fill
// groups of 32; else as stored.
[[nodiscard]] absl::StatusOr<PackedFormat> HeadPackedFormat(const Checkpoint& checkpoint,
                                                            const RankShare& share,
                                                            const MemoryOptions& options);
[[nodiscard]] absl::StatusOr<int64_t> EmbeddingBytes(const Checkpoint& checkpoint,
                                                     const RankShare& share);
// Norms and matrices of one layer.
[[nodiscard]] absl::StatusOr<int64_t> LayerBytes(const Checkpoint& checkpoint,
                                                 const RankShare& share, int32_t layer);
[[nodiscard]] int64_t RopeBytes(const model::ModelSpec& spec, int32_t max_context);
// One block, all layers, K and V.
[[nodiscard]] int64_t KvBlockBytes(const model::ModelSpec& spec, const RankShare& share,
                                   Numerics numerics);

inline constexpr int32_t kBlockTokens = 16;  // as step::kBlockTokens
inline constexpr int64_t kDefaultKvBytes = int64_t{2} << 30;

// Blocks of one sequence.
[[nodiscard]] constexpr int32_t SequenceBlocks(int32_t max_context) {
  return (max_context + kBlockTokens - 1) / kBlockTokens;
}

// INVALID_ARGUMENT names what is out of range for this model.
[[nodiscard]] absl::Status CheckMemoryOptions(const model::ModelSpec& spec,
                                              const MemoryOptions& options);
// Blocks that the options leave a rank whose other bytes are planned; the rules are PlanMemory's.
[[nodiscard]] absl::StatusOr<int32_t> KvBlocksWithin(const RankMemoryPlan& rank,
                                                     const MemoryOptions& options,
                                                     int32_t max_context);

// Refuses a checkpoint in which a tensor of the decoder is missing or does not fit, by name.
// INVALID_ARGUMENT for options out of range; RESOURCE_EXHAUSTED with the numbers when the budget
// does not hold the weights and one sequence of max_context. Without a budget and without
// kv_blocks: what max_slots sequences of max_context need, at most kDefaultKvBytes and at least
// one sequence.
[[nodiscard]] absl::StatusOr<MemoryPlan> PlanMemory(const Checkpoint& checkpoint,
                                                    int32_t rank_count,
                                                    const MemoryOptions& options);

}  // namespace nibble::weights
