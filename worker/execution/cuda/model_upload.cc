#include "worker/execution/cuda/model_upload.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/w4_decode.h"
#include "kernels/cuda/w4_pack.h"
#include "worker/weights/linear_shapes.h"

namespace nibble::execution {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kPinnedBytes = int64_t{32} << 20;

int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

ModelUpload::~ModelUpload() { static_cast<void>(cudaFree(scratch_)); }

absl::StatusOr<uint8_t*> ModelUpload::Scratch(int64_t bytes) {
  if (bytes > scratch_bytes_) {
    RETURN_IF_ERROR(CudaStatus(cudaFree(scratch_), "freeing scratch memory"));
    scratch_ = nullptr;
    RETURN_IF_ERROR(CudaStatus(cudaMalloc(&scratch_, static_cast<size_t>(bytes)),
                               "allocating scratch memory for packing"));
    scratch_bytes_ = bytes;
  }
  return static_cast<uint8_t*>(scratch_);
}

absl::StatusOr<ModelUpload::Staged> ModelUpload::StageArea(int32_t rows, int32_t columns,
                                                           int32_t group) {
  const int64_t count = static_cast<int64_t>(rows) * columns;
  Staged staged;
  if (group == 0) {
    ASSIGN_OR_RETURN(uint8_t * area, Scratch(count * 2));
    staged.dense = reinterpret_cast<cuda::Real16*>(area);
    return staged;
  }
  const int64_t groups = count / group;
  ASSIGN_OR_RETURN(uint8_t * area, Scratch(Aligned(count) + Aligned(groups) + Aligned(groups * 2)));
  staged.q = area;
  staged.zeros = area + Aligned(count);
  staged.scales = reinterpret_cast<half*>(staged.zeros + Aligned(groups));
  return staged;
}

absl::Status ModelUpload::Send(const void* from, void* to, int64_t bytes) {
  if (pinned_.bytes() == 0) {
    ASSIGN_OR_RETURN(pinned_, PinnedMemory::Allocate(kPinnedBytes));
  }
  for (int64_t at = 0; at < bytes; at += kPinnedBytes) {
    const auto piece = static_cast<size_t>(std::min(kPinnedBytes, bytes - at));
    std::memcpy(pinned_.as<uint8_t>(), static_cast<const uint8_t*>(from) + at, piece);
    RETURN_IF_ERROR(CudaStatus(cudaMemcpy(static_cast<uint8_t*>(to) + at, pinned_.as<uint8_t>(),
                                          piece, cudaMemcpyHostToDevice),
                               "sending weights"));
  }
  return absl::OkStatus();
}

absl::Status ModelUpload::CheckShape(const DeviceMatrix& shape, bool pair_rows) const {
  if (shape.columns % 8 == 0 && (!pair_rows || shape.rows % 16 == 0)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("a matrix of ", shape.rows, " rows and ", shape.columns,
                   " columns; the GPU kernels take columns in eights, and gate and up rows too"));
}

absl::StatusOr<DeviceMatrix> ModelUpload::Pack(const Staged& staged, const DeviceMatrix& shape,
                                               bool pair_rows) {
  RETURN_IF_ERROR(CheckShape(shape, pair_rows));
  DeviceMatrix matrix = shape;
  matrix.bytes = cuda::W4DecodeBytes(shape.rows, shape.columns, shape.group);
  ASSIGN_OR_RETURN(uint8_t * slabs, arena_->Allocate<uint8_t>(matrix.bytes));
  matrix.slabs = slabs;
  RETURN_IF_ERROR(CudaStatus(cuda::PackW4({.q = staged.q,
                                           .zeros = staged.zeros,
                                           .scales = staged.scales,
                                           .dense = staged.dense,
                                           .rows = shape.rows,
                                           .columns = shape.columns,
                                           .group = shape.group,
                                           .pair_rows = pair_rows,
                                           .slabs = slabs},
                                          nullptr),
                             "packing weights"));
  return matrix;
}

absl::StatusOr<DeviceMatrix> ModelUpload::Matrix(const HostMatrix& matrix, bool pair_rows) {
  DeviceMatrix shape{.rows = matrix.rows, .columns = matrix.columns, .group = matrix.group};
  ASSIGN_OR_RETURN(const Staged staged, StageArea(shape.rows, shape.columns, shape.group));
  if (matrix.group != 0) {
    RETURN_IF_ERROR(Send(matrix.q.data(), staged.q, static_cast<int64_t>(matrix.q.size())));
    RETURN_IF_ERROR(
        Send(matrix.zeros.data(), staged.zeros, static_cast<int64_t>(matrix.zeros.size())));
    RETURN_IF_ERROR(
        Send(matrix.scales.data(), staged.scales, static_cast<int64_t>(matrix.scales.size()) * 2));
  } else {
    RETURN_IF_ERROR(
        Send(matrix.dense.data(), staged.dense, static_cast<int64_t>(matrix.dense.size()) * 2));
  }
  if (!matrix.bias.empty()) {
    ASSIGN_OR_RETURN(shape.bias, Reals(matrix.bias));
  }
  return Pack(staged, shape, pair_rows);
}

absl::StatusOr<DeviceMatrix> ModelUpload::RandomMatrix(const weights::PackedFormat& format,
                                                       bool pair_rows) {
  const int32_t rows = format.rows;
  const int32_t columns = format.columns;
  const int32_t group = format.kind == weights::PackedKind::kW4 ? format.group : 0;
  const int64_t count = static_cast<int64_t>(rows) * columns;
  ASSIGN_OR_RETURN(const Staged staged, StageArea(rows, columns, group));
  // Products of normed inputs come out of the order of one.
  const float size = 1.0f / std::sqrt(static_cast<float>(columns));
  if (group == 0) {
    RETURN_IF_ERROR(CudaStatus(cuda::FillRandomReals(staged.dense, count, 0, 1.7f * size, seed_++,
                                                     {.element = model_->element_}),
                               "filling"));
  } else {
    RETURN_IF_ERROR(
        CudaStatus(cuda::FillRandomBytes(staged.q, count, seed_++, nullptr), "filling"));
    RETURN_IF_ERROR(CudaStatus(cuda::FillRandomBytes(staged.zeros, count / group, seed_++, nullptr),
                               "filling"));
    RETURN_IF_ERROR(CudaStatus(cuda::FillRandomReals(reinterpret_cast<cuda::Real16*>(staged.scales),
                                                     count / group, 0.15f * size, 0.03f * size,
                                                     seed_++, {.element = cuda::Element::kHalf}),
                               "filling"));
  }
  return Pack(staged, {.rows = rows, .columns = columns, .group = group}, pair_rows);
}

absl::StatusOr<const cuda::Real16*> ModelUpload::Reals(std::span<const uint16_t> reals) {
  ASSIGN_OR_RETURN(cuda::Real16 * on_device,
                   arena_->Allocate<cuda::Real16>(static_cast<int64_t>(reals.size())));
  RETURN_IF_ERROR(Send(reals.data(), on_device, static_cast<int64_t>(reals.size()) * 2));
  return on_device;
}

absl::StatusOr<const cuda::Real16*> ModelUpload::Norm(const weights::Checkpoint& checkpoint,
                                                      std::string_view name, int32_t size) {
  ASSIGN_OR_RETURN(const std::vector<float> values, checkpoint.LoadDense(name, {size}));
  ASSIGN_OR_RETURN(const std::vector<uint16_t> reals, Narrow(values, model_->element_, name));
  return Reals(reals);
}

absl::StatusOr<const cuda::Real16*> ModelUpload::RandomReals(int64_t count, float middle,
                                                             float amplitude) {
  ASSIGN_OR_RETURN(cuda::Real16 * on_device, arena_->Allocate<cuda::Real16>(count));
  RETURN_IF_ERROR(CudaStatus(cuda::FillRandomReals(on_device, count, middle, amplitude, seed_++,
                                                   {.element = model_->element_}),
                             "filling"));
  return on_device;
}

// Angles as transformers computes them: an fp32 product of position and frequency.
absl::Status ModelUpload::Rope() {
  const model::ModelSpec& spec = model_->spec_;
  const int32_t half_dim = spec.head_dim / 2;
  const model::RopeTable table =
      model::MakeRopeTable(spec.rope, spec.head_dim, model_->max_context_);
  const int64_t count = static_cast<int64_t>(model_->max_context_) * half_dim;
  std::vector<float> cos, sin;
  cos.reserve(static_cast<size_t>(count));
  sin.reserve(static_cast<size_t>(count));
  for (int32_t position = 0; position < model_->max_context_; ++position) {
    for (const float frequency : table.inverse_frequencies) {
      const auto angle = static_cast<double>(static_cast<float>(position) * frequency);
      cos.push_back(static_cast<float>(std::cos(angle)) * table.attention_factor);
      sin.push_back(static_cast<float>(std::sin(angle)) * table.attention_factor);
    }
  }
  ASSIGN_OR_RETURN(float* device_cos, arena_->Allocate<float>(count));
  ASSIGN_OR_RETURN(float* device_sin, arena_->Allocate<float>(count));
  RETURN_IF_ERROR(Send(cos.data(), device_cos, count * 4));
  RETURN_IF_ERROR(Send(sin.data(), device_sin, count * 4));
  model_->rope_cos_ = device_cos;
  model_->rope_sin_ = device_sin;
  return absl::OkStatus();
}

absl::Status ModelUpload::LoadNorms(const weights::Checkpoint& checkpoint) {
  const model::ModelSpec& spec = model_->spec_;
  for (int32_t layer = 0; layer < spec.layer_count; ++layer) {
    DeviceLayer& target = model_->layers_[static_cast<size_t>(layer)];
    const cuda::Real16** const places[] = {&target.attention_norm, &target.mlp_norm, &target.q_norm,
                                           &target.k_norm};
    const std::vector<weights::NormTensor> norms = weights::LayerNorms(spec, layer);
    CHECK(norms.size() <= std::size(places));
    for (size_t i = 0; i < norms.size(); ++i) {
      ASSIGN_OR_RETURN(*places[i], Norm(checkpoint, norms[i].name, norms[i].size));
    }
    target.window = spec.WindowedLayer(layer) ? spec.sliding_window : 0;
  }
  ASSIGN_OR_RETURN(model_->final_norm_,
                   Norm(checkpoint, weights::kFinalNormName, spec.hidden_size));
  return absl::OkStatus();
}

absl::Status ModelUpload::FillRandomly(const ModelFormats& formats) {
  const model::ModelSpec& spec = model_->spec_;
  for (size_t i = 0; i < model_->layers_.size(); ++i) {
    const weights::LayerFormats& format = formats.layers[i];
    DeviceLayer& layer = model_->layers_[i];
    ASSIGN_OR_RETURN(layer.qkv, RandomMatrix(format.qkv, false));
    ASSIGN_OR_RETURN(layer.o, RandomMatrix(format.o, false));
    ASSIGN_OR_RETURN(layer.gate_up, RandomMatrix(format.gate_up, true));
    ASSIGN_OR_RETURN(layer.down, RandomMatrix(format.down, false));
    ASSIGN_OR_RETURN(layer.attention_norm, RandomReals(spec.hidden_size, 1, 0.1f));
    ASSIGN_OR_RETURN(layer.mlp_norm, RandomReals(spec.hidden_size, 1, 0.1f));
  }
  ASSIGN_OR_RETURN(model_->embedding_,
                   RandomReals(static_cast<int64_t>(spec.vocab_size) * spec.hidden_size, 0, 0.05f));
  ASSIGN_OR_RETURN(model_->final_norm_, RandomReals(spec.hidden_size, 1, 0.1f));
  ASSIGN_OR_RETURN(model_->head_, RandomMatrix(formats.head, false));
  return CudaStatus(cudaStreamSynchronize(nullptr), "filling");
}

}  // namespace nibble::execution
