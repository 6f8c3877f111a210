#include "worker/execution/cuda/cuda_model.h"

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/w4_decode.h"
#include "worker/execution/cuda/model_upload.h"
#include "worker/weights/linear_shapes.h"

namespace nibble::execution {
namespace {

absl::Status CheckShape(const model::ModelSpec& spec, const weights::RankShare& share) {
  if (!cuda::AttentionSupports(share.heads.count(), share.kv_heads.count(), spec.head_dim)) {
    return absl::InvalidArgumentError(
        absl::StrCat("head_dim ", spec.head_dim, " with ", share.heads.count(), " query heads on ",
                     share.kv_heads.count(),
                     " KV heads; the GPU kernels take head_dim 16, 32, 64, 128 and at most ",
                     cuda::kAttentionRows, " queries a KV head"));
  }
  return absl::OkStatus();
}

absl::StatusOr<DeviceMatrix> PlanMatrix(const weights::PackedFormat& format, DeviceArena* arena) {
  DeviceMatrix matrix{.rows = format.rows,
                      .columns = format.columns,
                      .group = format.kind == weights::PackedKind::kW4 ? format.group : 0};
  matrix.bytes = cuda::W4DecodeBytes(matrix.rows, matrix.columns, matrix.group);
  RETURN_IF_ERROR(arena->Allocate<uint8_t>(matrix.bytes).status());
  if (format.bias) RETURN_IF_ERROR(arena->Allocate<cuda::Real16>(format.rows).status());
  return matrix;
}

}  // namespace

absl::StatusOr<ModelFormats> DescribeFormats(const weights::Checkpoint& checkpoint,
                                             const weights::RankShare& share) {
  ModelFormats formats;
  for (int32_t layer = 0; layer < checkpoint.spec().layer_count; ++layer) {
    ASSIGN_OR_RETURN(const weights::LayerFormats described,
                     weights::DescribeLayer(checkpoint, share, layer));
    formats.layers.push_back(described);
  }
  ASSIGN_OR_RETURN(formats.head, weights::DescribeRankHead(checkpoint, share));
  return formats;
}

ModelFormats RandomFormats(const model::ModelSpec& spec, const weights::RankShare& share,
                           int32_t group) {
  const auto w4 = [group](int32_t rows, int32_t columns) {
    return weights::PackedFormat{
        .kind = weights::PackedKind::kW4, .rows = rows, .columns = columns, .group = group};
  };
  const int32_t query = share.heads.count() * spec.head_dim;
  const weights::LayerFormats layer{
      .qkv = w4(query + 2 * share.kv_heads.count() * spec.head_dim, spec.hidden_size),
      .o = w4(spec.hidden_size, query),
      .gate_up = w4(2 * share.ffn.count(), spec.hidden_size),
      .down = w4(spec.hidden_size, share.ffn.count())};
  ModelFormats formats;
  formats.layers.assign(static_cast<size_t>(spec.layer_count), layer);
  formats.head = {.rows = share.vocab.count(), .columns = spec.hidden_size};
  return formats;
}

absl::StatusOr<std::unique_ptr<CudaModel>> CudaModel::Plan(const model::ModelSpec& spec,
                                                           const weights::RankShare& share,
                                                           const ModelFormats& formats,
                                                           int32_t max_context) {
  RETURN_IF_ERROR(CheckShape(spec, share));
  std::unique_ptr<CudaModel> model(
      new CudaModel(spec, share, max_context, cuda::Element::kHalf, DeviceArena::Mode::kCount));
  DeviceArena* arena = &model->arena_;
  for (int32_t index = 0; index < spec.layer_count; ++index) {
    const weights::LayerFormats& format = formats.layers[static_cast<size_t>(index)];
    DeviceLayer& layer = model->layers_[static_cast<size_t>(index)];
    ASSIGN_OR_RETURN(layer.qkv, PlanMatrix(format.qkv, arena));
    ASSIGN_OR_RETURN(layer.o, PlanMatrix(format.o, arena));
    ASSIGN_OR_RETURN(layer.gate_up, PlanMatrix(format.gate_up, arena));
    ASSIGN_OR_RETURN(layer.down, PlanMatrix(format.down, arena));
    for (const weights::NormTensor& norm : weights::LayerNorms(spec, index)) {
      RETURN_IF_ERROR(arena->Allocate<cuda::Real16>(norm.size).status());
    }
  }
  RETURN_IF_ERROR(
      arena->Allocate<cuda::Real16>(static_cast<int64_t>(spec.vocab_size) * spec.hidden_size)
          .status());
  RETURN_IF_ERROR(arena->Allocate<cuda::Real16>(spec.hidden_size).status());
  ASSIGN_OR_RETURN(model->head_, PlanMatrix(formats.head, arena));
  for (int table = 0; table < 2; ++table) {
    RETURN_IF_ERROR(
        arena->Allocate<float>(static_cast<int64_t>(max_context) * (spec.head_dim / 2)).status());
  }
  return model;
}

absl::StatusOr<std::unique_ptr<CudaModel>> CudaModel::Load(const weights::Checkpoint& checkpoint,
                                                           const weights::RankShare& share,
                                                           int32_t max_context,
                                                           cuda::Element element,
                                                           const Progress& progress) {
  const model::ModelSpec& spec = checkpoint.spec();
  ASSIGN_OR_RETURN(const ModelFormats formats, DescribeFormats(checkpoint, share));
  ASSIGN_OR_RETURN(const auto planned, Plan(spec, share, formats, max_context));
  std::unique_ptr<CudaModel> model(new CudaModel(spec, share, max_context, element));
  RETURN_IF_ERROR(model->arena_.Reserve(planned->bytes()));
  MatrixQueue matrices(checkpoint, share, element, /*stored=*/true);
  ModelUpload upload(model.get());
  RETURN_IF_ERROR(upload.StartMatrices(&matrices));
  RETURN_IF_ERROR(upload.Rope());
  RETURN_IF_ERROR(upload.LoadNorms(checkpoint));
  for (int32_t layer = 0; layer < spec.layer_count; ++layer) {
    RETURN_IF_ERROR(upload.LoadLayer(layer));
    if (progress) progress(model->bytes());
  }
  RETURN_IF_ERROR(upload.LoadEnds());
  RETURN_IF_ERROR(upload.Finish());
  if (progress) progress(model->bytes());
  return model;
}

absl::StatusOr<std::unique_ptr<CudaModel>> CudaModel::Random(const model::ModelSpec& spec,
                                                             const weights::RankShare& share,
                                                             int32_t group, int32_t max_context,
                                                             cuda::Element element) {
  const ModelFormats formats = RandomFormats(spec, share, group);
  ASSIGN_OR_RETURN(const auto planned, Plan(spec, share, formats, max_context));
  std::unique_ptr<CudaModel> model(new CudaModel(spec, share, max_context, element));
  RETURN_IF_ERROR(model->arena_.Reserve(planned->bytes()));
  ModelUpload upload(model.get());
  RETURN_IF_ERROR(upload.Rope());
  RETURN_IF_ERROR(upload.FillRandomly(formats));
  return model;
}

}  // namespace nibble::execution
