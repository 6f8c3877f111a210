// The decoder's matrix products: which kernel takes one, and what it leaves for the next.
#include "kernels/cuda/w4_batch.h"
#include "kernels/cuda/w4_decode.h"
#include "kernels/cuda/w4_order.h"
#include "kernels/cuda/w4_wgmma.h"
#include "worker/execution/cuda/cuda_decoder.h"

namespace nibble::execution {
namespace {

// The less a share's products have to read, the more their rings' first copies hold up the
// activations of the product before (kernels/cuda/NOTES.md, "Sums over GPUs").
int32_t SharePace(const DeviceLayer& layer) {
  constexpr int64_t kMiB = 1 << 20;
  const int64_t bytes = layer.qkv.bytes + layer.o.bytes + layer.gate_up.bytes + layer.down.bytes;
  return bytes < 64 * kMiB ? 4500 : bytes < 128 * kMiB ? 2600 : 0;
}

}  // namespace

absl::Status CudaDecoder::Multiply(const Product& product) {
  const DeviceMatrix& matrix = *product.matrix;
  if (hopper_ && product.tokens <= FewTokens()) {
    RETURN_IF_ERROR(MultiplyFew(product));
  } else {
    RETURN_IF_ERROR(MultiplyMany(product));
  }
  return Timed(product.name, matrix.bytes,
               int64_t{2} * product.tokens * matrix.rows * matrix.columns);
}

absl::Status CudaDecoder::MultiplyMany(const Product& product) {
  const DeviceMatrix& matrix = *product.matrix;
  const cuda::W4BatchParams params{.slabs = matrix.slabs,
                                   .rows = matrix.rows,
                                   .columns = matrix.columns,
                                   .group = matrix.group,
                                   .tokens = product.tokens,
                                   .x = product.x,
                                   .output = product.output,
                                   .y_half = product.y_half,
                                   .y_float = product.y_float,
                                   .residual_out = residual_,
                                   .bias = matrix.bias};
  if (hopper_) return MultiplyOrdered(product, params);
  return CudaStatus(cuda::W4Batch(params, Launch()), "matrix product");
}

absl::Status CudaDecoder::MultiplyOrdered(const Product& product,
                                          const cuda::W4BatchParams& params) {
  if (product.ordered == nullptr) {
    RETURN_IF_ERROR(CudaStatus(cuda::OrderActivations({.x = params.x,
                                                       .tokens = params.tokens,
                                                       .columns = params.columns,
                                                       .group = params.group,
                                                       .ordered = ordered_[0]},
                                                      Launch()),
                               "activations' order"));
  }
  cuda::WgmmaInput input{.ordered = product.ordered == nullptr ? ordered_[0] : product.ordered,
                         .fixed_scales = product.ordered_scales,
                         .next_ordered = product.next_ordered,
                         .next_group = product.next_group};
  TakeLeft(&input);
  if (mlp_fixed_) input.fixed_scales = mlp_scales_;
  mlp_fixed_ = input.fixed_scales != nullptr && product.next_ordered != nullptr &&
               product.next_group == 128 && cuda::W4WgmmaFixedSilu(params, multiprocessors_);
  if (mlp_fixed_) input.next_scales = mlp_scales_;
  if (product.output == cuda::DecodeOutput::kSiluMul) input.help = help_;
  if (product.in_parts && product.next_norm != nullptr && Meets(product.tokens)) {
    Leave(product, &input);
  } else if (product.in_parts) {
    part_count_ = cuda::W4WgmmaParts(params, multiprocessors_);
    input.parts = parts_;
  }
  return CudaStatus(cuda::W4Wgmma(params, input, multiprocessors_, Launch()), "matrix product");
}

void CudaDecoder::TakeLeft(cuda::WgmmaInput* input) {
  if (!left_.valid) return;
  left_.valid = false;
  input->ordered = left_.x;
  input->fixed_scales = left_.fixed ? left_.fixed_scales : nullptr;
  input->normed = {.scale = scales_[scale_],
                   .square_sums = left_.square_sums,
                   .parts = layout::GpuSlabs(model_.spec().hidden_size),
                   .epsilon = model_.spec().norm_epsilon,
                   .inverse_rms_out = scales_[1 - scale_]};
  scale_ = 1 - scale_;
}

void CudaDecoder::Leave(const Product& product, cuda::WgmmaInput* input) {
  left_.valid = true;
  left_.fixed = product.next_group == 128 && product.tokens <= cuda::kWgmmaFixedTokens;
  input->meeting = meeting_;
  input->next_scales = left_.fixed ? left_.fixed_scales : nullptr;
  input->next = {.x = left_.x,
                 .norm_weight = product.next_norm,
                 .scale = scales_[scale_],
                 .square_sums = left_.square_sums};
}

absl::Status CudaDecoder::MultiplyFew(const Product& product) {
  const DeviceMatrix& matrix = *product.matrix;
  cuda::W4DecodeParams params;
  params.slabs = matrix.slabs;
  params.rows = matrix.rows;
  params.columns = matrix.columns;
  params.group = matrix.group;
  params.tokens = product.tokens;
  params.x = product.x;
  if (product.in_fragments) params.x_order = layout::GpuFragments(product.tokens, matrix.group);
  if (NormsInProducts(product.tokens)) {
    params.next.order = layout::GpuFragments(product.tokens, product.next_group);
    params.y_order = params.next.order;
  }
  if (product.normed_input) {
    params.normed = {.scale = scales_[scale_],
                     .square_sums = square_sums_,
                     .parts = square_parts_,
                     .epsilon = model_.spec().norm_epsilon,
                     .inverse_rms_out = scales_[1 - scale_]};
    scale_ = 1 - scale_;
  }
  params.output = product.output;
  params.y_half = product.y_half;
  params.y_float = product.y_float;
  if (product.output == cuda::DecodeOutput::kAddResidual) {
    params.residual_out = residual_;
    params.next = {.x = normed_,
                   .norm_weight = product.next_norm,
                   .scale = scales_[scale_],
                   .square_sums = square_sums_,
                   .order = params.next.order};
    square_parts_ = layout::GpuRowTiles(matrix.rows);
    if (parallel()) params.exchange = *Exchange();
  }
  params.bias = matrix.bias;
  if (parallel() && product.tokens <= 4) params.pace = SharePace(model_.layers()[0]);
  params.dependent_launch = Launch().dependent;
  params.element = model_.element();
  return CudaStatus(cuda::W4Decode(params, multiprocessors_, stream_), "decode matrix product");
}

}  // namespace nibble::execution
