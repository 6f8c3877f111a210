#include "worker/execution/cpu/buffers.h"

#include <algorithm>

namespace nibble::execution {
namespace {

constexpr int64_t kSmallestGroup = 32;

// `terms`: weights::ActivationTerms.
Buffers::Converted AllocateConverted(int64_t rows, int64_t columns, int32_t terms, Arena* arena) {
  const int64_t groups = (columns + kSmallestGroup - 1) / kSmallestGroup;
  Buffers::Converted converted;
  converted.scales = arena->Allocate<float>(rows * groups);
  if (terms > 0) {
    converted.values = arena->Allocate<int8_t>(rows * terms * columns);
    converted.sums = arena->Allocate<int32_t>(rows * groups);
  }
  return converted;
}

}  // namespace

Buffers AllocateBuffers(const ModelShard& model, const BufferOptions& options, Arena* activations,
                        Arena* workspace) {
  const model::ModelSpec& spec = model.spec();
  const weights::RankShare& share = model.share();
  const int64_t tokens = options.memory.max_step_tokens;
  const int64_t query_columns = int64_t{share.heads.count()} * spec.head_dim;
  const int64_t kv_columns = int64_t{share.kv_heads.count()} * spec.head_dim;
  const int64_t ffn = share.ffn.count();
  const int32_t terms = weights::ActivationTerms(options.memory);
  Buffers buffers;
  buffers.residual = activations->Allocate<float>(tokens * spec.hidden_size);
  buffers.normed = activations->Allocate<float>(tokens * spec.hidden_size);
  buffers.qkv = activations->Allocate<float>(tokens * (query_columns + 2 * kv_columns));
  buffers.attention = activations->Allocate<float>(tokens * query_columns);
  buffers.gate_up = activations->Allocate<float>(tokens * 2 * ffn);
  buffers.mlp = activations->Allocate<float>(tokens * ffn);
  buffers.projected = activations->Allocate<float>(tokens * spec.hidden_size);
  const int64_t widest = std::max({int64_t{spec.hidden_size}, query_columns, ffn});
  buffers.shared = AllocateConverted(tokens, widest, terms, activations);
  buffers.shared.mlp = buffers.mlp;
  for (int32_t thread = 0; thread < options.threads; ++thread) {
    const int64_t rows = std::min<int64_t>(kPrivateTokens, tokens);
    Buffers::Converted own = AllocateConverted(rows, widest, terms, activations);
    own.mlp = activations->Allocate<float>(rows * ffn);
    buffers.per_thread.push_back(own);
  }
  buffers.sample_rows = std::min(options.memory.max_slots, options.memory.max_step_tokens);
  buffers.logits_stride = options.vocab_share_max;
  const int64_t logits = int64_t{buffers.sample_rows} * buffers.logits_stride;
  buffers.logits = workspace->Allocate<float>(logits);
  buffers.whole_row.resize(static_cast<size_t>(options.threads), nullptr);
  if (share.rank_count > 1) {
    buffers.gathered = workspace->Allocate<float>(logits * share.rank_count);
  }
  for (float*& row : buffers.whole_row) row = workspace->Allocate<float>(spec.vocab_size);
  return buffers;
}

}  // namespace nibble::execution
