// From the residual stream to tokens: the last layer of a few rows, head, plain rows, rows that ask
// for more than their best token.
#include <utility>

#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/sample_whole.h"
#include "kernels/cuda/token_counts.h"
#include "worker/execution/cuda/cuda_decoder.h"

namespace nibble::execution {

absl::Status CudaDecoder::LastLayerOfRows(const StepView& step) {
  const auto index = static_cast<int32_t>(model_.layers().size()) - 1;
  if (step.rows == 0) return RotateAndStore(step, index);
  RETURN_IF_ERROR(Attend(step, index));
  const DeviceLayer& layer = model_.layers().back();
  scale_ = 0;
  RETURN_IF_ERROR(CudaStatus(cuda::KeepRows({.rows = step.row_tokens,
                                             .count = step.rows,
                                             .hidden = model_.spec().hidden_size,
                                             .columns = layer.o.columns,
                                             .residual = residual_,
                                             .x = attention_,
                                             .epsilon = model_.spec().norm_epsilon,
                                             .residual_out = kept_residual_,
                                             .x_out = qkv_,
                                             .inverse_rms_out = scales_[scale_]},
                                            Launch()),
                             "rows to go on with"));
  RETURN_IF_ERROR(Timed("rows to go on with"));
  StepView kept = step;
  kept.tokens = step.rows;
  std::swap(residual_, kept_residual_);
  absl::Status status = AddToResidual({.name = "o",
                                       .matrix = &layer.o,
                                       .tokens = kept.tokens,
                                       .x = qkv_,
                                       .next_group = layer.gate_up.group,
                                       .next_norm = layer.mlp_norm});
  if (status.ok()) status = Mlp(kept, index);
  std::swap(residual_, kept_residual_);
  return status;
}

absl::Status CudaDecoder::SampleRows(const StepView& step, int32_t begin, int32_t end) {
  const int32_t count = end - begin;
  const bool in_products =
      KeepsRows(step) || (step.every_token_sampled && NormsInProducts(step.tokens));
  if (!in_products) {
    const int32_t* rows = LastNormTakesAll(step) ? nullptr : step.row_tokens + begin;
    RETURN_IF_ERROR(Norm(model_.final_norm(), rows, count, model_.head()));
  }
  RETURN_IF_ERROR(Multiply({.name = "head",
                            .matrix = &model_.head(),
                            .tokens = count,
                            .x = normed_,
                            .ordered = OrderedInput(count),
                            .normed_input = in_products,
                            .in_fragments = in_products,
                            .output = cuda::DecodeOutput::kFloat,
                            .y_float = parallel() ? own_logits_ : logits_}));
  if (parallel()) RETURN_IF_ERROR(JoinLogits(count));
  RETURN_IF_ERROR(CudaStatus(cuda::Sample({.logits = logits_,
                                           .rows = step.sample_rows + begin,
                                           .count = count,
                                           .vocab_size = model_.spec().vocab_size,
                                           .sampled = step.sampled + begin,
                                           .last_tokens = last_tokens_,
                                           .scratch = sample_scratch_},
                                          Launch()),
                             "sampling"));
  return Timed("sampling", int64_t{count} * model_.spec().vocab_size * 4);
}

absl::Status CudaDecoder::CountHistories(const cuda::HistoryParams& params) {
  return CudaStatus(cuda::CountHistories(params, {.stream = stream_}), "counting tokens");
}

absl::Status CudaDecoder::SampleWhole(cuda::WholeParams params) {
  params.logits = logits_;
  params.last_tokens = last_tokens_;
  RETURN_IF_ERROR(
      CudaStatus(cuda::SampleWhole(params, hopper_, {.stream = stream_}), "sampling whole rows"));
  return Timed("sampling of whole rows", int64_t{params.count} * params.vocab_size * 4);
}

absl::Status CudaDecoder::AcceptDrafts(cuda::DraftParams params) {
  params.last_tokens = last_tokens_;
  return CudaStatus(cuda::AcceptDrafts(params, {.stream = stream_}), "accepting drafts");
}

}  // namespace nibble::execution
