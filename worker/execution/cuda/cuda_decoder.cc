#include "worker/execution/cuda/cuda_decoder.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/attention_portable.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/probe.h"
#include "kernels/cuda/w4_batch.h"
#include "kernels/cuda/w4_wgmma.h"
#include "kernels/layout/gpu_w4.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {
namespace {

// Which kernels run here. Where there is no GPU, what is planned is planned for Hopper.
bool OnHopper() {
  const bool probed = cuda::ProbeKernels() == cudaSuccess;
  static_cast<void>(cudaGetLastError());
  return !probed || cuda::KernelsForHopper();
}

// Of activations' order (kernels/layout/gpu_x.h).
int32_t OrderedGroup(const DeviceMatrix& matrix) { return matrix.group == 0 ? 128 : matrix.group; }

}  // namespace

absl::StatusOr<std::unique_ptr<CudaDecoder>> CudaDecoder::Create(const CudaModel* model,
                                                                 const DecoderOptions& options,
                                                                 cudaStream_t stream) {
  std::unique_ptr<CudaDecoder> decoder(new CudaDecoder(model, options, stream));
  if (!decoder->arena_.counting()) {
    int device = 0;
    RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device), "asking for the device"));
    RETURN_IF_ERROR(CudaStatus(
        cudaDeviceGetAttribute(&decoder->multiprocessors_, cudaDevAttrMultiProcessorCount, device),
        "asking for the number of multiprocessors"));
  }
  decoder->hopper_ = OnHopper();
  if (!decoder->arena_.counting()) {
    DecoderOptions counting = options;
    counting.mode = DeviceArena::Mode::kCount;
    ASSIGN_OR_RETURN(const auto planned, Create(model, counting, nullptr));
    RETURN_IF_ERROR(decoder->arena_.Reserve(planned->arena_.bytes()));
  }
  RETURN_IF_ERROR(
      decoder->Allocate((model->max_context() + step::kBlockTokens - 1) / step::kBlockTokens));
  return decoder;
}

absl::Status CudaDecoder::Allocate(int32_t table_size) {
  const model::ModelSpec& spec = model_.spec();
  const weights::RankShare& share = model_.share();
  const int64_t tokens = options_.max_step_tokens;
  const int64_t query = int64_t{share.heads.count()} * spec.head_dim;
  const int64_t kv = int64_t{share.kv_heads.count()} * spec.head_dim;
  const int64_t ffn = share.ffn.count();
  table_size_ = table_size;
  kv_part_bytes_ = (int64_t{options_.kv_blocks} + 1) * step::kBlockTokens * kv * 2;
  ASSIGN_OR_RETURN(kv_, kv_arena_.Allocate<uint8_t>(kv_part_bytes_ * 2 * spec.layer_count));
  const int64_t slots = int64_t{options_.max_slots} + 1;
  ASSIGN_OR_RETURN(block_tables_, arena_.Allocate<int32_t>(slots * table_size));
  ASSIGN_OR_RETURN(last_tokens_, arena_.Allocate<int32_t>(slots));
  // Rows that pad a batch write into a block of their own.
  if (!arena_.counting()) {
    RETURN_IF_ERROR(
        CudaStatus(cudaMemcpy(block_tables_ + (slots - 1) * table_size, &options_.kv_blocks,
                              sizeof(int32_t), cudaMemcpyHostToDevice),
                   "preparing block tables"));
  }
  ASSIGN_OR_RETURN(residual_, arena_.Allocate<float>(tokens * spec.hidden_size));
  ASSIGN_OR_RETURN(kept_residual_, arena_.Allocate<float>(FewTokens() * spec.hidden_size));
  const int64_t parts = layout::GpuRowTiles(spec.hidden_size);
  ASSIGN_OR_RETURN(square_sums_, arena_.Allocate<float>(FewTokens() * parts));
  for (float*& scales : scales_) {
    ASSIGN_OR_RETURN(scales, arena_.Allocate<float>(cuda::kWgmmaMeetingTokens));
  }
  const int64_t normed_rows =
      hopper_ ? FewTokens() : std::max<int64_t>(tokens, options_.sample_rows);
  const auto room = [this](int64_t rows, int64_t columns) {
    const int64_t few = layout::GpuFragmentCount(FewTokens(), static_cast<int32_t>(columns));
    return std::max(rows * columns, few);
  };
  ASSIGN_OR_RETURN(normed_, arena_.Allocate<cuda::Real16>(room(normed_rows, spec.hidden_size)));
  ASSIGN_OR_RETURN(qkv_, arena_.Allocate<cuda::Real16>(tokens * (query + 2 * kv)));
  ASSIGN_OR_RETURN(attention_, arena_.Allocate<cuda::Real16>(room(tokens, query)));
  const int64_t mlp_rows = OrderedMlp() ? std::min<int64_t>(FewTokens(), tokens) : tokens;
  ASSIGN_OR_RETURN(mlp_, arena_.Allocate<cuda::Real16>(room(mlp_rows, ffn)));
  if (!options_.fusion) {
    ASSIGN_OR_RETURN(gate_up_, arena_.Allocate<cuda::Real16>(tokens * 2 * ffn));
    ASSIGN_OR_RETURN(projected_, arena_.Allocate<float>(tokens * spec.hidden_size));
  }
  ASSIGN_OR_RETURN(logits_,
                   arena_.Allocate<float>(int64_t{options_.sample_rows} * spec.vocab_size));
  ASSIGN_OR_RETURN(sample_scratch_, arena_.Allocate<cuda::SampleScratch>(1));
  RETURN_IF_ERROR(AllocateForGroup());
  const int32_t kv_heads = share.kv_heads.count();
  const int32_t places = cuda::AttentionPlaces(kv_heads);
  ASSIGN_OR_RETURN(attention_scratch_, arena_.Allocate<float>(cuda::AttentionScratchFloats(
                                           places, kv_heads, spec.head_dim)));
  return hopper_ && options_.max_step_tokens > FewTokens() ? AllocateOrdered() : absl::OkStatus();
}

absl::StatusOr<float*> CudaDecoder::AllocateWords(int64_t count) {
  ASSIGN_OR_RETURN(float* words, arena_.Allocate<float>(count));
  if (!arena_.counting()) {
    RETURN_IF_ERROR(CudaStatus(
        cudaMemsetAsync(words, 0xff, static_cast<size_t>(count) * sizeof(float), stream_),
        "preparing sums"));
  }
  return words;
}

absl::Status CudaDecoder::AllocateOrdered() {
  int32_t columns[2] = {model_.head().columns, 0};
  for (const DeviceLayer& layer : model_.layers()) {
    columns[0] = std::max({columns[0], layer.o.columns, layer.gate_up.columns});
    int32_t& of_down = columns[OrderedMlp() ? 1 : 0];
    of_down = std::max(of_down, layer.down.columns);
  }
  for (size_t i = 0; i < 2; ++i) {
    const int64_t count = layout::GpuOrderedCount(options_.max_step_tokens, columns[i]);
    ASSIGN_OR_RETURN(ordered_[i], arena_.Allocate<cuda::Real16>(count));
  }
  if (!options_.fusion) return absl::OkStatus();
  const int64_t tokens = std::min(options_.max_step_tokens, cuda::kWgmmaPartsTokens);
  const int32_t rows = std::max(model_.spec().hidden_size, model_.layers()[0].qkv.rows);
  ASSIGN_OR_RETURN(parts_, arena_.Allocate<float>(cuda::kWgmmaPartsMax * tokens * rows));
  if (parallel()) return absl::OkStatus();
  const int32_t hidden = model_.spec().hidden_size;
  constexpr int32_t kMeeting = cuda::kWgmmaMeetingTokens, kFixed = cuda::kWgmmaFixedTokens;
  const int64_t meeting = int64_t{cuda::kWgmmaPartsMax} * kMeeting * hidden;
  ASSIGN_OR_RETURN(meeting_, AllocateWords(meeting));
  ASSIGN_OR_RETURN(help_, AllocateWords(cuda::WgmmaHelpWords(model_.layers()[0].gate_up.rows)));
  ASSIGN_OR_RETURN(left_.x,
                   arena_.Allocate<cuda::Real16>(layout::GpuOrderedCount(kMeeting, hidden)));
  ASSIGN_OR_RETURN(left_.fixed_scales,
                   arena_.Allocate<float>(layout::GpuFixedScaleCount(kFixed, hidden)));
  ASSIGN_OR_RETURN(left_.square_sums, arena_.Allocate<float>(kMeeting * layout::GpuSlabs(hidden)));
  ASSIGN_OR_RETURN(mlp_scales_,
                   arena_.Allocate<float>(layout::GpuFixedScaleCount(kFixed, columns[1])));
  if (!LayersTakeFixed()) return absl::OkStatus();
  const int64_t scales = layout::GpuFixedScaleCount(kFixed, model_.layers()[0].o.columns);
  ASSIGN_OR_RETURN(attention_scales_, arena_.Allocate<float>(scales));
  return absl::OkStatus();
}

bool CudaDecoder::LayersTakeFixed() const {
  const weights::RankShare& share = model_.share();
  if (!OrderedMlp() || model_.element() != cuda::Element::kHalf ||
      !cuda::AttentionLeavesFixed(share.heads.count(), share.kv_heads.count(),
                                  model_.spec().head_dim)) {
    return false;
  }
  return std::ranges::all_of(model_.layers(), [this](const DeviceLayer& layer) {
    return layer.qkv.group == 128 && layer.o.group == 128 && layer.down.group == 128 &&
           cuda::W4WgmmaFixedSilu({.rows = layer.gate_up.rows,
                                   .group = layer.gate_up.group,
                                   .tokens = cuda::kWgmmaFixedTokens,
                                   .output = cuda::DecodeOutput::kSiluMul},
                                  multiprocessors_);
  });
}

bool CudaDecoder::OrderedMlp() const {
  return hopper_ && options_.fusion &&
         model_.layers()[0].down.columns % layout::kGpuSlabColumns == 0;
}

cuda::KvLayer CudaDecoder::Cache(int32_t layer) const {
  uint8_t* keys = kv_ + 2 * layer * kv_part_bytes_;
  return {.keys = reinterpret_cast<cuda::Real16*>(keys),
          .values = reinterpret_cast<cuda::Real16*>(keys + kv_part_bytes_)};
}

bool CudaDecoder::NormsInProducts(int32_t tokens) const {
  return hopper_ && options_.fusion && tokens <= FewTokens() && SumsInKernels();
}

bool CudaDecoder::LeavesParts(int32_t tokens) const {
  const bool fits = !parallel() || model_.spec().hidden_size <= cuda::kExchangeHiddenMax;
  return parts_ != nullptr && tokens > FewTokens() && tokens <= cuda::kWgmmaPartsTokens &&
         SumsInKernels() && fits;
}

bool CudaDecoder::Meets(int32_t tokens) const {
  return meeting_ != nullptr && LeavesParts(tokens) && tokens <= cuda::kWgmmaMeetingTokens &&
         model_.element() == cuda::Element::kHalf;
}

cuda::Real16* CudaDecoder::OrderedInput(int32_t tokens) const {
  return hopper_ && tokens > FewTokens() ? ordered_[0] : nullptr;
}

layout::GpuFragmentOrder CudaDecoder::AttentionFragments(const StepView& step,
                                                         const DeviceLayer& layer) const {
  if (!NormsInProducts(step.tokens) || step.prompt_tile_count > 0) return {};
  return layout::GpuFragments(step.tokens, layer.o.group);
}

cuda::Real16* CudaDecoder::OrderedAttention(const StepView& step, const DeviceLayer& layer) const {
  if (&layer == &model_.layers().back() && KeepsRows(step)) return nullptr;
  // Whole slabs: what pads one is multiplied by zeros and must not be NaN.
  const bool slabs = layer.o.columns % layout::kGpuSlabColumns == 0;
  const bool heads =
      step.prompt_tile_count == 0 || model_.spec().head_dim % OrderedGroup(layer.o) == 0;
  return options_.fusion && slabs && heads ? OrderedInput(step.tokens) : nullptr;
}

absl::Status CudaDecoder::Embed(const StepView& step) {
  cuda::EmbedParams embed{.table = model_.embedding(),
                          .token_ids = step.token_ids,
                          .last_tokens = last_tokens_,
                          .tokens = step.tokens,
                          .hidden = model_.spec().hidden_size,
                          .residual = residual_};
  if (NormsInProducts(step.tokens)) {
    square_parts_ = 1;
    scale_ = 0;
    embed.next = {.x = normed_,
                  .norm_weight = model_.layers()[0].attention_norm,
                  .square_sums = square_sums_,
                  .order = layout::GpuFragments(step.tokens, model_.layers()[0].qkv.group)};
    embed.epsilon = model_.spec().norm_epsilon;
    embed.scale_out = scales_[scale_];
  }
  // The first kernel reads what a copy brought, which no dependent launch waits for.
  const cuda::LaunchOptions launch{.stream = stream_, .element = model_.element()};
  if (is_fixed_) {
    left_.valid = true;
    left_.fixed = true;
    scale_ = 0;
    embed.next = {.x = left_.x,
                  .norm_weight = model_.layers()[0].attention_norm,
                  .square_sums = left_.square_sums};
    embed.scale_out = scales_[0];
    RETURN_IF_ERROR(CudaStatus(
        cuda::FixedEmbed({.embed = embed, .scales = left_.fixed_scales}, launch), "embedding"));
  } else {
    RETURN_IF_ERROR(CudaStatus(cuda::Embed(embed, launch), "embedding"));
  }
  return Timed("embedding", int64_t{step.tokens} * embed.hidden * 2);
}

absl::Status CudaDecoder::Forward(const StepView& step) {
  part_count_ = 0;
  left_.valid = false;
  mlp_fixed_ = false;
  partial_waits_ = false;
  is_fixed_ = IsFixed(step);
  RETURN_IF_ERROR(Embed(step));
  for (int32_t layer = 0; layer < model_.spec().layer_count; ++layer) {
    RETURN_IF_ERROR(Layer(step, layer));
  }
  return absl::OkStatus();
}

absl::Status CudaDecoder::Layer(const StepView& step, int32_t index) {
  const DeviceLayer& layer = model_.layers()[static_cast<size_t>(index)];
  const bool in_products = NormsInProducts(step.tokens);
  if (!in_products) RETURN_IF_ERROR(Norm(layer.attention_norm, nullptr, step.tokens, layer.qkv));
  RETURN_IF_ERROR(Multiply({.name = "qkv",
                            .matrix = &layer.qkv,
                            .tokens = step.tokens,
                            .x = normed_,
                            .ordered = OrderedInput(step.tokens),
                            .normed_input = in_products,
                            .in_fragments = in_products,
                            .y_half = qkv_,
                            .in_parts = RotatesInAttention(step) && LeavesParts(step.tokens)}));
  if (&layer == &model_.layers().back() && KeepsRows(step)) return LastLayerOfRows(step);
  RETURN_IF_ERROR(Attend(step, index));
  RETURN_IF_ERROR(AddToResidual({.name = "o",
                                 .matrix = &layer.o,
                                 .tokens = step.tokens,
                                 .x = attention_,
                                 .ordered = OrderedAttention(step, layer),
                                 .ordered_scales = is_fixed_ ? attention_scales_ : nullptr,
                                 .in_fragments = AttentionFragments(step, layer).exists(),
                                 .next_group = layer.gate_up.group,
                                 .next_norm = layer.mlp_norm,
                                 .in_parts = LeavesParts(step.tokens)}));
  return Mlp(step, index);
}

absl::Status CudaDecoder::RotateAndStore(const StepView& step, int32_t index) {
  const model::ModelSpec& spec = model_.spec();
  const DeviceLayer& layer = model_.layers()[static_cast<size_t>(index)];
  RETURN_IF_ERROR(CudaStatus(cuda::RopeAndStore({.qkv = qkv_,
                                                 .tokens = step.tokens,
                                                 .heads = model_.share().heads.count(),
                                                 .kv_heads = model_.share().kv_heads.count(),
                                                 .head_dim = spec.head_dim,
                                                 .positions = step.positions,
                                                 .blocks = step.blocks,
                                                 .cos = model_.rope_cos(),
                                                 .sin = model_.rope_sin(),
                                                 .q_norm = layer.q_norm,
                                                 .k_norm = layer.k_norm,
                                                 .epsilon = spec.norm_epsilon,
                                                 .cache = Cache(index)},
                                                Launch()),
                             "rotary positions"));
  return Timed("rotary positions");
}

absl::Status CudaDecoder::Attend(const StepView& step, int32_t index) {
  const model::ModelSpec& spec = model_.spec();
  const DeviceLayer& layer = model_.layers()[static_cast<size_t>(index)];
  const int32_t heads = model_.share().heads.count();
  const int32_t kv_heads = model_.share().kv_heads.count();
  // A step of one token a sequence leaves rotation to attention.
  cuda::AttentionRotation rotation;
  const int64_t q_stride = int64_t{heads + 2 * kv_heads} * spec.head_dim;
  if (RotatesInAttention(step)) {
    rotation = {.cos = model_.rope_cos(),
                .sin = model_.rope_sin(),
                .q_norm = layer.q_norm,
                .k_norm = layer.k_norm,
                .epsilon = spec.norm_epsilon,
                .parts = part_count_ > 0 ? parts_ : nullptr,
                .part_count = part_count_,
                .part_stride = step.tokens * q_stride};
    part_count_ = 0;
  } else {
    RETURN_IF_ERROR(RotateAndStore(step, index));
  }
  const auto attention = hopper_ ? cuda::Attention : cuda::AttentionPortable;
  RETURN_IF_ERROR(
      CudaStatus(attention({.q = qkv_,
                            .q_stride = q_stride,
                            .rotation = rotation,
                            .out = attention_,
                            .ordered = OrderedAttention(step, layer),
                            .ordered_group = OrderedGroup(layer.o),
                            .ordered_tokens = layout::GpuOrderedTokens(step.tokens),
                            .ordered_scales = is_fixed_ ? attention_scales_ : nullptr,
                            .fragments = AttentionFragments(step, layer),
                            .cache = Cache(index),
                            .block_tables = block_tables_,
                            .table_size = table_size_,
                            .units = step.units,
                            .unit_count = step.unit_count,
                            .tiles = step.prompt_tiles,
                            .tile_count = step.prompt_tile_count,
                            .heads = heads,
                            .kv_heads = kv_heads,
                            .head_dim = spec.head_dim,
                            .window = layer.window,
                            .scale = 1.0f / std::sqrt(static_cast<float>(spec.head_dim)),
                            .blocks = cuda::AttentionBlocks(step.tokens, multiprocessors_),
                            .scratch = attention_scratch_},
                           Launch()),
                 "attention"));
  return Timed("attention", step.kv_positions * kv_heads * spec.head_dim * 4,
               step.score_count * heads * spec.head_dim * 4);
}

absl::Status CudaDecoder::Mlp(const StepView& step, int32_t index) {
  const std::vector<DeviceLayer>& layers = model_.layers();
  const DeviceLayer& layer = layers[static_cast<size_t>(index)];
  const bool in_products = NormsInProducts(step.tokens);
  if (!in_products) RETURN_IF_ERROR(Norm(layer.mlp_norm, nullptr, step.tokens, layer.gate_up));
  cuda::Real16* ordered = OrderedMlp() && step.tokens > FewTokens() ? ordered_[1] : nullptr;
  Product gate_up{.name = "gate and up",
                  .matrix = &layer.gate_up,
                  .tokens = step.tokens,
                  .x = normed_,
                  .ordered = OrderedInput(step.tokens),
                  .normed_input = in_products,
                  .in_fragments = in_products,
                  .output = cuda::DecodeOutput::kSiluMul,
                  .y_half = mlp_,
                  .next_ordered = ordered,
                  .next_group = layer.down.group};
  if (!options_.fusion) {
    gate_up.output = cuda::DecodeOutput::kHalf;
    gate_up.y_half = gate_up_;
  }
  RETURN_IF_ERROR(Multiply(gate_up));
  if (!options_.fusion) {
    RETURN_IF_ERROR(CudaStatus(
        cuda::SiluMul(
            {.gate_up = gate_up_, .tokens = step.tokens, .ffn = layer.down.columns, .out = mlp_},
            Launch()),
        "SiLU"));
    RETURN_IF_ERROR(Timed("SiLU"));
  }
  const size_t next = static_cast<size_t>(index) + 1;
  const bool is_last = next == layers.size();
  const bool norm_follows = !is_last || LastNormTakesAll(step);
  return AddToResidual({.name = "down",
                        .matrix = &layer.down,
                        .tokens = step.tokens,
                        .x = mlp_,
                        .ordered = ordered,
                        .in_fragments = in_products,
                        .next_group = is_last ? model_.head().group : layers[next].qkv.group,
                        .next_norm = is_last ? model_.final_norm() : layers[next].attention_norm,
                        .in_parts = LeavesParts(step.tokens) && norm_follows,
                        .norm_follows = norm_follows});
}

absl::Status CudaDecoder::AddToResidual(const Product& product) {
  // Whoever finishes rows of o and down, or adds up their parts, takes the sum over ranks, too.
  const bool in_kernels = NormsInProducts(product.tokens) || product.in_parts;
  if (parallel() && !in_kernels) return AddOverRanks(product);
  Product sum = product;
  if (options_.fusion) {
    sum.output = cuda::DecodeOutput::kAddResidual;
    return Multiply(sum);
  }
  sum.output = cuda::DecodeOutput::kFloat;
  sum.y_float = projected_;
  RETURN_IF_ERROR(Multiply(sum));
  RETURN_IF_ERROR(
      CudaStatus(cuda::AddResidual({.residual = residual_,
                                    .projected = projected_,
                                    .count = static_cast<int64_t>(sum.tokens) * sum.matrix->rows},
                                   Launch()),
                 "adding to the residual stream"));
  return Timed("residual sum");
}

absl::Status CudaDecoder::Norm(const cuda::Real16* weight, const int32_t* rows, int32_t count,
                               const DeviceMatrix& next) {
  if (left_.valid) return absl::OkStatus();
  if (cuda::Real16* ordered = OrderedInput(count); ordered != nullptr) {
    scale_ = 0;
    cuda::LaunchOptions launch = Launch();
    launch.dependent = launch.dependent && !partial_waits_;  // behind NCCL's kernel
    RETURN_IF_ERROR(CudaStatus(
        cuda::OrderedNorm(
            {.residual = residual_,
             .rows = rows,
             .weight = weight,
             .tokens = count,
             .hidden = model_.spec().hidden_size,
             .epsilon = model_.spec().norm_epsilon,
             .group = next.group,
             .ordered = ordered,
             .parts = part_count_ > 0 ? parts_ : nullptr,
             .part_count = part_count_,
             .partial = partial_waits_ ? reinterpret_cast<cuda::Real16*>(partial_) : nullptr,
             .inverse_rms_out = Meets(count) ? scales_[0] : nullptr,
             .exchange = part_count_ > 0 && parallel() ? *Exchange() : cuda::PeerExchange{}},
            launch),
        "norm"));
    part_count_ = 0;
    partial_waits_ = false;
    return Timed("norm");
  }
  RETURN_IF_ERROR(CudaStatus(cuda::RmsNorm({.residual = residual_,
                                            .rows = rows,
                                            .weight = weight,
                                            .tokens = count,
                                            .hidden = model_.spec().hidden_size,
                                            .epsilon = model_.spec().norm_epsilon,
                                            .out = normed_},
                                           Launch()),
                             "norm"));
  return Timed("norm");
}

}  // namespace nibble::execution
