#include "worker/weights/activation_plan.h"

#include <algorithm>

namespace nibble::weights {
namespace {

constexpr int64_t kSmallestGroup = 32;
constexpr int64_t kSortEntryBytes = 8;   // a logit and its token
constexpr int64_t kCandidateBytes = 16;  // a score and its token

int64_t Floats(int64_t rows, int64_t columns) {
  return AlignedBytes(rows * columns * int64_t{sizeof(float)});
}

int64_t ConvertedBytes(int64_t rows, int64_t columns, int32_t terms) {
  const int64_t groups = (columns + kSmallestGroup - 1) / kSmallestGroup;
  const int64_t sums = Floats(rows, groups);
  return terms == 0 ? sums : 2 * sums + AlignedBytes(rows * terms * columns);
}

}  // namespace

ActivationPlan PlanActivations(const model::ModelSpec& spec, const RankShare& share,
                               const MemoryOptions& options, int32_t max_context,
                               int32_t vocab_share_max) {
  const int64_t tokens = options.max_step_tokens;
  const int64_t own_tokens = std::min<int64_t>(tokens, kPrivateTokens);
  const int64_t slots = options.max_slots;
  const int64_t rows = std::min(slots, tokens);
  const int64_t threads = options.threads;
  const int64_t query_columns = int64_t{share.heads.count()} * spec.head_dim;
  const int64_t kv_columns = int64_t{share.kv_heads.count()} * spec.head_dim;
  const int64_t ffn = share.ffn.count();
  const int64_t widest = std::max({int64_t{spec.hidden_size}, query_columns, ffn});
  ActivationPlan plan;
  plan.hidden = Floats(tokens, spec.hidden_size);
  plan.normed = plan.hidden;
  plan.qkv = Floats(tokens, query_columns + 2 * kv_columns);
  plan.attention = Floats(tokens, query_columns);
  plan.gate_up = Floats(tokens, 2 * ffn);
  plan.mlp = Floats(tokens, ffn);
  plan.projected = plan.hidden;
  const int32_t terms = ActivationTerms(options);
  plan.converted =
      ConvertedBytes(tokens, widest, terms) + threads * ConvertedBytes(own_tokens, widest, terms);
  plan.private_mlp = threads * Floats(own_tokens, ffn);
  plan.logits = Floats(rows, vocab_share_max);
  if (share.rank_count > 1) {
    plan.gathered = Floats(rows * share.rank_count, vocab_share_max);
  }
  plan.whole_rows = threads * Floats(1, spec.vocab_size);
  plan.candidates = threads * spec.vocab_size * kSortEntryBytes +
                    rows * (threads + 1 + share.rank_count) * kCandidateBytes;
  plan.penalties = slots * spec.vocab_size * int64_t{sizeof(uint16_t)};
  const int64_t table = (max_context + kBlockTokens - 1) / kBlockTokens;
  plan.block_tables = slots * table * int64_t{sizeof(int32_t)};
  return plan;
}

}  // namespace nibble::weights
