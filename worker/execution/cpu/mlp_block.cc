#include "worker/execution/cpu/mlp_block.h"

namespace nibble::execution {

void RunMlpBlock(RankContext* context, int32_t thread, int32_t layer, const MatrixInput& input) {
  const LayerShard& shard = context->model->layers()[static_cast<size_t>(layer)];
  const Buffers& buffers = *context->buffers;
  const InputConverter& converter = *context->converter;
  const int32_t threads = context->team->threads();
  const int32_t tokens = context->tokens();
  const int32_t ffn = shard.down.columns();
  shard.gate_up.Multiply(*context->kernels, input, buffers.gate_up, shard.gate_up.rows(),
                         ShareOf(shard.gate_up.row_blocks(), thread, threads));
  context->team->Barrier(thread);
  const cpu::BlockRange mine = converter.TokensOf(thread, tokens);
  float* rows = converter.MlpRows(thread, tokens);
  context->kernels->silu_mul(buffers.gate_up + static_cast<int64_t>(mine.begin) * 2 * ffn,
                             mine.end - mine.begin, ffn,
                             rows + static_cast<int64_t>(mine.begin) * ffn);
  const MatrixInput hidden =
      converter.Convert(thread, shard.down.input_form(), Rows(rows, tokens, ffn),
                        InputConverter::Rows::kOwnTokensOnly);
  shard.down.Multiply(*context->kernels, hidden, buffers.projected, shard.down.rows(),
                      ShareOf(shard.down.row_blocks(), thread, threads));
}

}  // namespace nibble::execution
