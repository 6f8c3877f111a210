// What ModelUpload does with the matrices of a checkpoint, one after the other.
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "kernels/cuda/w4_decode.h"
#include "kernels/cuda/w4_pack.h"
#include "worker/execution/cuda/model_upload.h"

namespace nibble::execution {
namespace {

constexpr int32_t kFlagsMax = 1 << 16;
constexpr int64_t kAlignment = 256;

int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t PartBytes(const StoredPart& part) {
  return Aligned(part.values.bytes()) + Aligned(part.zeros.bytes()) + Aligned(part.scales.bytes());
}

}  // namespace

absl::Status ModelUpload::StartMatrices(MatrixQueue* matrices) {
  matrices_ = matrices;
  ASSIGN_OR_RETURN(flags_, flags_arena_.Allocate<int32_t>(kFlagsMax));
  ASSIGN_OR_RETURN(sender_, BlockSender::Create(matrices->StoredBlocks()));
  return absl::OkStatus();
}

int32_t* ModelUpload::FlagOf(const std::string& tensor) {
  CHECK(flagged_.size() < kFlagsMax);
  flagged_.push_back(tensor);
  return flags_ + flagged_.size() - 1;
}

absl::StatusOr<DeviceMatrix> ModelUpload::Next(bool pair_rows) {
  ASSIGN_OR_RETURN(const HostMatrix host, matrices_->Next());
  if (!host.stored.has_value()) return Matrix(host, pair_rows);
  return host.stored->group == 0 ? PackStoredDense(*host.stored)
                                 : PackStored(*host.stored, pair_rows);
}

absl::StatusOr<DeviceMatrix> ModelUpload::PackStored(const StoredMatrix& stored, bool pair_rows) {
  DeviceMatrix matrix{.rows = stored.rows, .columns = stored.columns, .group = stored.group};
  RETURN_IF_ERROR(CheckShape(matrix, pair_rows));
  matrix.bytes = cuda::W4DecodeBytes(matrix.rows, matrix.columns, matrix.group);
  ASSIGN_OR_RETURN(uint8_t * slabs, arena_->Allocate<uint8_t>(matrix.bytes));
  matrix.slabs = slabs;
  int64_t bytes = 0;
  for (const StoredPart& part : stored.parts) bytes += PartBytes(part);
  ASSIGN_OR_RETURN(uint8_t * area, Scratch(bytes));
  // One flag a matrix, in the name of its first part.
  cuda::PackGemmParams params;
  params.rows = matrix.rows;
  params.columns = matrix.columns;
  params.group = matrix.group;
  params.pair_rows = pair_rows;
  params.slabs = slabs;
  params.not_finite = FlagOf(stored.parts.front().name);
  CHECK(stored.parts.size() <= cuda::kGemmPartsMax);
  for (size_t i = 0; i < stored.parts.size(); ++i) {
    const StoredPart& part = stored.parts[i];
    uint8_t* zeros = area + Aligned(part.values.bytes());
    uint8_t* scales = zeros + Aligned(part.zeros.bytes());
    RETURN_IF_ERROR(sender_->SendNext(area, nullptr));
    RETURN_IF_ERROR(sender_->SendNext(zeros, nullptr));
    RETURN_IF_ERROR(sender_->SendNext(scales, nullptr));
    params.parts[i] = {.qweight = reinterpret_cast<const uint32_t*>(area),
                       .qzeros = reinterpret_cast<const uint32_t*>(zeros),
                       .scales = reinterpret_cast<const half*>(scales),
                       .rows = part.rows};
    area += PartBytes(part);
  }
  RETURN_IF_ERROR(CudaStatus(cuda::PackGemm(params, nullptr), "packing weights"));
  return matrix;
}

absl::StatusOr<DeviceMatrix> ModelUpload::PackStoredDense(const StoredMatrix& stored) {
  const StoredPart& part = stored.parts.front();
  ASSIGN_OR_RETURN(const Staged staged, StageArea(stored.rows, stored.columns, 0));
  RETURN_IF_ERROR(sender_->SendNext(staged.dense, nullptr));
  RETURN_IF_ERROR(CudaStatus(cuda::CheckFinite(staged.dense, part.values.bytes() / 2,
                                               FlagOf(part.name), {.element = model_->element_}),
                             "checking weights"));
  return Pack(staged, {.rows = stored.rows, .columns = stored.columns}, false);
}

absl::StatusOr<const cuda::Real16*> ModelUpload::Embedding() {
  ASSIGN_OR_RETURN(const HostMatrix host, matrices_->Next());
  if (!host.stored.has_value()) return Reals(host.dense);
  const StoredPart& part = host.stored->parts.front();
  const int64_t count = part.values.bytes() / 2;
  ASSIGN_OR_RETURN(cuda::Real16 * on_device, arena_->Allocate<cuda::Real16>(count));
  RETURN_IF_ERROR(sender_->SendNext(on_device, nullptr));
  RETURN_IF_ERROR(CudaStatus(
      cuda::CheckFinite(on_device, count, FlagOf(part.name), {.element = model_->element_}),
      "checking weights"));
  return on_device;
}

absl::Status ModelUpload::LoadLayer(int32_t layer) {
  DeviceLayer& target = model_->layers_[static_cast<size_t>(layer)];
  for (DeviceMatrix* matrix : {&target.qkv, &target.o, &target.gate_up, &target.down}) {
    ASSIGN_OR_RETURN(*matrix, Next(matrix == &target.gate_up));
  }
  return absl::OkStatus();
}

absl::Status ModelUpload::LoadEnds() {
  ASSIGN_OR_RETURN(model_->head_, Next(false));
  ASSIGN_OR_RETURN(model_->embedding_, Embedding());
  return absl::OkStatus();
}

absl::Status ModelUpload::Finish() {
  // A copy of no flags at all would wait for nothing.
  RETURN_IF_ERROR(CudaStatus(cudaStreamSynchronize(nullptr), "packing weights"));
  std::vector<int32_t> flags(flagged_.size());
  RETURN_IF_ERROR(CudaStatus(
      cudaMemcpy(flags.data(), flags_, flags.size() * sizeof(int32_t), cudaMemcpyDeviceToHost),
      "packing weights"));
  for (size_t i = 0; i < flags.size(); ++i) {
    if (flags[i] == 0) continue;
    return absl::DataLossError(absl::StrCat(
        "tensor ", flagged_[i], ", or one fused with it, holds a value that is not finite"));
  }
  return absl::OkStatus();
}

}  // namespace nibble::execution
