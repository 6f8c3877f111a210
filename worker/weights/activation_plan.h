// What a CPU rank allocates beside weights and KV cache: once, for every layer and step.
#pragma once

#include <cstdint>

#include "worker/weights/memory_plan.h"

namespace nibble::weights {

// Steps of at most this many tokens are converted by every thread for itself.
inline constexpr int32_t kPrivateTokens = 4;

// Int8 terms of the activations that enter 4-bit matrices; 0 with exact numerics, which takes fp32.
// One term costs about 0.1 % of perplexity, as little as an int8 head; whoever keeps the head as
// stored gets two, which cost nothing that can be measured.
[[nodiscard]] constexpr int32_t ActivationTerms(const MemoryOptions& options) {
  if (options.numerics == Numerics::kExact) return 0;
  return options.head == HeadFormat::kStored ? 2 : 1;
}

// Bytes of each buffer. T = max_step_tokens, P = min(T, kPrivateTokens), R = min(max_slots, T)
// rows sampled at a time, C = the widest input of a matrix of this rank, N = threads, V = the
// largest rank's vocabulary share.
struct ActivationPlan {
  // Activations, each array rounded up to 64 bytes.
  int64_t hidden = 0;     // [T, hidden] fp32: the residual stream
  int64_t normed = 0;     // [T, hidden] fp32
  int64_t qkv = 0;        // [T, (heads + 2 * kv_heads) * head_dim] fp32
  int64_t attention = 0;  // [T, heads * head_dim] fp32
  int64_t gate_up = 0;    // [T, 2 * ffn] fp32
  int64_t mlp = 0;        // [T, ffn] fp32
  int64_t projected = 0;  // [T, hidden] fp32: what o and down give, before the sum over ranks
  // Rows in a matrix's input form, once for T and N times for P rows. Fast: [rows, C] int8 per
  // term with a scale fp32 and a sum int32 per 32 columns. Exact: a sum fp32 per 32 columns.
  int64_t converted = 0;
  int64_t private_mlp = 0;  // N times [P, ffn] fp32

  // Workspace.
  int64_t logits = 0;        // [R, V] fp32, rounded up to 64 bytes
  int64_t gathered = 0;      // [ranks, R, V] fp32, with several ranks only, rounded up
  int64_t whole_rows = 0;    // N times [vocab] fp32, each rounded up
  int64_t candidates = 0;    // N times [vocab] of 8 bytes, and R * (N + 1 + ranks) of 16
  int64_t penalties = 0;     // [max_slots, vocab] uint16
  int64_t block_tables = 0;  // [max_slots, ceil(max_context / kBlockTokens)] int32

  [[nodiscard]] int64_t activation_bytes() const {
    return hidden + normed + qkv + attention + gate_up + mlp + projected + converted + private_mlp;
  }
  [[nodiscard]] int64_t workspace_bytes() const {
    return logits + gathered + whole_rows + candidates + penalties + block_tables;
  }
};

// `vocab_share_max`: rows of the largest rank's vocabulary share.
[[nodiscard]] ActivationPlan PlanActivations(const model::ModelSpec& spec, const RankShare& share,
                                             const MemoryOptions& options, int32_t max_context,
                                             int32_t vocab_share_max);

}  // namespace nibble::weights
