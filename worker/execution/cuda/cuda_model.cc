#include "worker/execution/cuda/cuda_model.h"

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attention.h"
#include "worker/execution/cuda/model_upload.h"

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

}  // namespace

absl::StatusOr<std::unique_ptr<CudaModel>> CudaModel::Load(const weights::Checkpoint& checkpoint,
                                                           const weights::RankShare& share,
                                                           int32_t max_context,
                                                           const Progress& progress) {
  const model::ModelSpec& spec = checkpoint.spec();
  RETURN_IF_ERROR(CheckShape(spec, share));
  std::unique_ptr<CudaModel> model(new CudaModel(spec, share, max_context));
  ModelUpload upload(model.get());
  RETURN_IF_ERROR(upload.Rope());
  RETURN_IF_ERROR(upload.LoadEnds(checkpoint));
  for (int32_t layer = 0; layer < spec.layer_count; ++layer) {
    RETURN_IF_ERROR(upload.LoadLayer(checkpoint, layer));
    if (progress) progress(model->bytes());
  }
  return model;
}

absl::StatusOr<std::unique_ptr<CudaModel>> CudaModel::Random(const model::ModelSpec& spec,
                                                             int32_t group, int32_t max_context) {
  const weights::RankShare share{.rank = 0,
                                 .rank_count = 1,
                                 .heads = {0, spec.head_count},
                                 .kv_heads = {0, spec.kv_head_count},
                                 .ffn = {0, spec.ffn_size},
                                 .vocab = {0, spec.vocab_size}};
  RETURN_IF_ERROR(CheckShape(spec, share));
  std::unique_ptr<CudaModel> model(new CudaModel(spec, share, max_context));
  ModelUpload upload(model.get());
  RETURN_IF_ERROR(upload.Rope());
  RETURN_IF_ERROR(upload.FillRandomly(group));
  return model;
}

}  // namespace nibble::execution
