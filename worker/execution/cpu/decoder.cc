#include "worker/execution/cpu/decoder.h"

#include <cstring>

#include "worker/execution/cpu/mlp_block.h"

namespace nibble::execution {

void Decoder::RunThread(int32_t thread) {
  CopyBlocks(thread);
  if (!Embed(thread) || !RunLayers(thread)) return;
  if (thread == 0) sampling_began_ = std::chrono::steady_clock::now();
  // A failure stands in the context's status.
  static_cast<void>(sampler_->Run(thread));
}

// Each thread copies the blocks of its layers; the barriers before the first attention follow.
void Decoder::CopyBlocks(int32_t thread) {
  const weights::RankShare& share = context_->model->share();
  const int32_t layers = context_->model->spec().layer_count;
  const cpu::BlockRange mine = ShareOf(layers, thread, context_->team->threads());
  for (const step::BlockCopy& copy : context_->plan->block_copies) {
    for (int32_t layer = mine.begin; layer < mine.end; ++layer) {
      const cpu::KvCache& cache = context_->kv_caches[static_cast<size_t>(layer)];
      const int64_t element = cache.type == cpu::ElementType::kF32 ? 4 : 2;
      const int64_t bytes = element * share.kv_heads.count() * cache.head_dim * step::kBlockTokens;
      for (void* base : {cache.keys, cache.values}) {
        auto* memory = static_cast<std::byte*>(base);
        std::memmove(memory + copy.to * bytes, memory + copy.from * bytes,
                     static_cast<size_t>(bytes));
      }
    }
  }
}

bool Decoder::Embed(int32_t thread) {
  const ModelShard& model = *context_->model;
  const int32_t hidden = model.spec().hidden_size;
  float* residual = context_->buffers->residual;
  const cpu::BlockRange mine = ShareOf(context_->tokens(), thread, context_->team->threads());
  for (int32_t token = mine.begin; token < mine.end; ++token) {
    model.Embed(context_->rows.inputs[static_cast<size_t>(token)].token_id,
                residual + static_cast<int64_t>(token) * hidden);
  }
  if (context_->communicator->size() == 1) return true;
  return context_->Collect(thread, [&] {
    const auto count = static_cast<size_t>(context_->tokens()) * static_cast<size_t>(hidden);
    return context_->communicator->AllReduceSum({residual, count});
  });
}

bool Decoder::RunLayers(int32_t thread) {
  const std::vector<LayerShard>& layers = context_->model->layers();
  MatrixInput input;
  NormResidual(context_, thread, layers[0].attention_norm, layers[0].qkv.input_form(), &input);
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    attention_.Run(thread, static_cast<int32_t>(layer), input);
    if (!ReduceAndNorm(context_, thread, layers[layer].mlp_norm, layers[layer].gate_up.input_form(),
                       &input)) {
      return false;
    }
    RunMlpBlock(context_, thread, static_cast<int32_t>(layer), input);
    const bool last = layer + 1 == layers.size();
    const bool reduced = last ? ReduceIntoResidual(context_, thread)
                              : ReduceAndNorm(context_, thread, layers[layer + 1].attention_norm,
                                              layers[layer + 1].qkv.input_form(), &input);
    if (!reduced) return false;
    if (thread == 0 && stamp_ != nullptr) stamp_();
  }
  return true;
}

}  // namespace nibble::execution
