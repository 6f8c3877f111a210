#include "worker/execution/cpu/attention_block.h"

#include <cmath>

namespace nibble::execution {
namespace {

// Columns of the fused QKV rows on this rank.
struct QkvColumns {
  explicit QkvColumns(const ModelShard& model)
      : head_dim(model.spec().head_dim),
        heads(model.share().heads.count()),
        kv_heads(model.share().kv_heads.count()),
        key(heads * head_dim),
        value(key + kv_heads * head_dim),
        total(value + kv_heads * head_dim) {}
  int32_t head_dim, heads, kv_heads;
  int32_t key, value, total;
};

}  // namespace

void AttentionBlock::Run(int32_t thread, int32_t layer, const MatrixInput& input) {
  const RankContext& context = *context_;
  const LayerShard& shard = context.model->layers()[static_cast<size_t>(layer)];
  const Buffers& buffers = *context.buffers;
  const int32_t threads = context.team->threads();
  shard.qkv.Multiply(*context.kernels, input, buffers.qkv, shard.qkv.rows(),
                     ShareOf(shard.qkv.row_blocks(), thread, threads));
  context.team->Barrier(thread);
  RotateAndStore(thread, layer);
  if (thread == 0) next_piece_.store(0, std::memory_order_relaxed);
  context.team->Barrier(thread);
  Attend(layer);
  context.team->Barrier(thread);
  const MatrixInput attended = context.converter->Convert(
      thread, shard.o.input_form(), Rows(buffers.attention, context.tokens(), shard.o.columns()),
      InputConverter::Rows::kReady);
  shard.o.Multiply(*context.kernels, attended, buffers.projected, shard.o.rows(),
                   ShareOf(shard.o.row_blocks(), thread, threads));
}

// Norms (Qwen3) and rotates the query and key heads of the own tokens, and writes keys and values
// into the cache.
void AttentionBlock::RotateAndStore(int32_t thread, int32_t layer) {
  const RankContext& context = *context_;
  const cpu::Kernels& kernels = *context.kernels;
  const ModelShard& model = *context.model;
  const LayerShard& shard = model.layers()[static_cast<size_t>(layer)];
  const QkvColumns columns(model);
  const float epsilon = model.spec().norm_epsilon;
  const cpu::KvCache& cache = context.kv_caches[static_cast<size_t>(layer)];
  const cpu::BlockRange mine = ShareOf(context.tokens(), thread, context.team->threads());
  for (int32_t token = mine.begin; token < mine.end; ++token) {
    const InputRow& row = context.rows.inputs[static_cast<size_t>(token)];
    float* q = context.buffers->qkv + static_cast<int64_t>(token) * columns.total;
    float* k = q + columns.key;
    if (shard.q_norm != nullptr) {
      kernels.rms_norm(Rows(q, columns.heads, columns.head_dim), shard.q_norm, epsilon, q,
                       columns.head_dim);
      kernels.rms_norm(Rows(k, columns.kv_heads, columns.head_dim), shard.k_norm, epsilon, k,
                       columns.head_dim);
    }
    // Query and key heads lie side by side.
    kernels.rope(q, columns.heads + columns.kv_heads, columns.head_dim, model.rope(), row.position);
    kernels.write_kv(cache, k, q + columns.value, row.block, row.position % step::kBlockTokens);
  }
}

// Pieces differ in cost, so each thread takes the next one when it is done with its last: every
// row is computed by one thread alone, whichever it is.
void AttentionBlock::Attend(int32_t layer) {
  const RankContext& context = *context_;
  const ModelShard& model = *context.model;
  const QkvColumns columns(model);
  const auto& pieces = context.rows.pieces;
  const auto count = static_cast<int32_t>(pieces.size());
  for (int32_t index = next_piece_.fetch_add(1, std::memory_order_relaxed); index < count;
       index = next_piece_.fetch_add(1, std::memory_order_relaxed)) {
    const AttentionPiece& piece = pieces[static_cast<size_t>(index)];
    const step::SequenceStep& sequence =
        context.plan->sequences[static_cast<size_t>(piece.sequence)];
    const int64_t first_row = piece.first_row;
    const cpu::AttentionArgs args{.q = context.buffers->qkv + first_row * columns.total,
                                  .q_stride = columns.total,
                                  .out = context.buffers->attention + first_row * columns.key,
                                  .out_stride = columns.key,
                                  .cache = context.kv_caches[static_cast<size_t>(layer)],
                                  .block_table = context.slots->block_table(sequence.slot),
                                  .first_position = sequence.first_position,
                                  .window = model.layers()[static_cast<size_t>(layer)].window,
                                  .heads = columns.heads,
                                  .scale = 1.0f / std::sqrt(static_cast<float>(columns.head_dim))};
    context.kernels->attention(args, piece.token_begin, piece.token_end, piece.head_begin,
                               piece.head_end);
  }
}

}  // namespace nibble::execution
