#include "worker/weights/activation_plan.h"

#include <algorithm>

#include "kernels/layout/cpu_w4.h"

namespace nibble::weights {
namespace {

constexpr int64_t kSmallestGroup = 32;

}  // namespace

ActivationPlan PlanActivations(const model::ModelSpec& spec, const RankShare& share,
                               const MemoryOptions& options, int32_t max_context,
                               int32_t vocab_share_max) {
  const int64_t tokens = options.max_step_tokens;
  const int64_t slots = options.max_slots;
  const int64_t query_columns = int64_t{share.heads.count()} * spec.head_dim;
  const int64_t kv_columns = int64_t{share.kv_heads.count()} * spec.head_dim;
  const int64_t ffn = share.ffn.count();
  const auto floats = [](int64_t rows, int64_t columns) {
    return AlignedBytes(rows * columns * int64_t{sizeof(float)});
  };
  ActivationPlan plan;
  plan.hidden = floats(tokens, spec.hidden_size);
  plan.normed = plan.hidden;
  plan.qkv = floats(tokens, query_columns + 2 * kv_columns);
  plan.attention = floats(tokens, query_columns);
  plan.gate_up = floats(tokens, 2 * ffn);
  plan.mlp = floats(tokens, ffn);
  plan.projected = plan.hidden;
  const int64_t widest = std::max({int64_t{spec.hidden_size}, query_columns, ffn});
  const int64_t groups = (widest + kSmallestGroup - 1) / kSmallestGroup;
  plan.quantized = floats(tokens, groups);
  if (options.numerics == Numerics::kFast) {
    plan.quantized += AlignedBytes(tokens * widest) + floats(tokens, groups);
  }
  plan.logits = floats(slots, share.vocab.count());
  plan.gathered = floats(slots, int64_t{vocab_share_max} * share.rank_count);
  plan.penalties = AlignedBytes(slots * spec.vocab_size * int64_t{sizeof(uint16_t)});
  plan.block_tables = floats(slots, (max_context + kBlockTokens - 1) / kBlockTokens);
  return plan;
}

}  // namespace nibble::weights
