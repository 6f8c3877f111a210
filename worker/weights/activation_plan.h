// Buffers of a CPU rank that depend on the sizes of a step only: allocated once, used by every
// layer and step.
#pragma once

#include <cstdint>

#include "worker/weights/memory_plan.h"

namespace nibble::weights {

// Bytes of each buffer, rounded up to 64. T = max_step_tokens, S = max_slots (the most rows that
// are sampled in one step), C = the widest input of a matrix of this rank.
struct ActivationPlan {
  // Activations.
  int64_t hidden = 0;      // [T, hidden] fp32: the residual stream
  int64_t normed = 0;      // [T, hidden] fp32
  int64_t qkv = 0;         // [T, (heads + 2 * kv_heads) * head_dim] fp32
  int64_t attention = 0;   // [T, heads * head_dim] fp32
  int64_t gate_up = 0;     // [T, 2 * ffn] fp32
  int64_t mlp = 0;         // [T, ffn] fp32
  int64_t projected = 0;   // [T, hidden] fp32: what o and down give, before the sum over ranks
  int64_t quantized = 0;   // fast: [T, C] int8, and scale fp32 and sum int32 per 32 columns;
                           // exact: a sum fp32 per 32 columns
  // Workspace.
  int64_t logits = 0;        // [S, vocab share] fp32
  int64_t gathered = 0;      // [S, vocab] fp32, shares padded to the largest
  int64_t penalties = 0;     // [S, vocab] uint16
  int64_t block_tables = 0;  // [S, ceil(max_context / kBlockTokens)] int32

  [[nodiscard]] int64_t activation_bytes() const {
    return hidden + normed + qkv + attention + gate_up + mlp + projected + quantized;
  }
  [[nodiscard]] int64_t workspace_bytes() const {
    return logits + gathered + penalties + block_tables;
  }
};

// `vocab_share_max`: rows of the largest rank's vocabulary share.
[[nodiscard]] ActivationPlan PlanActivations(const model::ModelSpec& spec, const RankShare& share,
                                             const MemoryOptions& options, int32_t max_context,
                                             int32_t vocab_share_max);

}  // namespace nibble::weights
