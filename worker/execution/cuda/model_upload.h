// Sends matrices and vectors to the device while a model is made.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/execution/cuda/block_sender.h"
#include "worker/execution/cuda/cuda_model.h"
#include "worker/execution/cuda/device_memory.h"
#include "worker/execution/cuda/host_matrix.h"

namespace nibble::execution {

// Scratch memory grows to the largest matrix and is freed with this. One thread.
class ModelUpload {
 public:
  explicit ModelUpload(CudaModel* model) : model_(model), arena_(&model->arena_) {}
  ~ModelUpload();
  ModelUpload(const ModelUpload&) = delete;
  ModelUpload& operator=(const ModelUpload&) = delete;

  // `pair_rows`: the rows are all gates, then all ups.
  [[nodiscard]] absl::StatusOr<DeviceMatrix> Matrix(const HostMatrix& matrix, bool pair_rows);
  // Random values of that form.
  [[nodiscard]] absl::StatusOr<DeviceMatrix> RandomMatrix(const weights::PackedFormat& format,
                                                          bool pair_rows);
  // Of the element type, as bits.
  [[nodiscard]] absl::StatusOr<const cuda::Real16*> Reals(std::span<const uint16_t> reals);
  [[nodiscard]] absl::StatusOr<const cuda::Real16*> RandomReals(int64_t count, float middle,
                                                                float amplitude);
  [[nodiscard]] absl::Status Rope();
  [[nodiscard]] absl::Status LoadNorms(const weights::Checkpoint& checkpoint);
  // Reading begins; `matrices` outlives this.
  [[nodiscard]] absl::Status StartMatrices(MatrixQueue* matrices);
  // Matrices come from the queue, in its order: every layer, then the ends.
  [[nodiscard]] absl::Status LoadLayer(int32_t layer);
  [[nodiscard]] absl::Status LoadEnds();
  // Waits for the device. DATA_LOSS names a tensor with a value that is not finite.
  [[nodiscard]] absl::Status Finish();
  [[nodiscard]] absl::Status FillRandomly(const ModelFormats& formats);

 private:
  // Logical values on the device.
  struct Staged {
    uint8_t* q = nullptr;
    uint8_t* zeros = nullptr;
    half* scales = nullptr;
    cuda::Real16* dense = nullptr;
  };
  [[nodiscard]] absl::StatusOr<const cuda::Real16*> Norm(const weights::Checkpoint& checkpoint,
                                                         std::string_view name, int32_t size);
  [[nodiscard]] absl::StatusOr<uint8_t*> Scratch(int64_t bytes);
  [[nodiscard]] absl::StatusOr<DeviceMatrix> Next(bool pair_rows);
  [[nodiscard]] absl::StatusOr<DeviceMatrix> PackStored(const StoredMatrix& matrix, bool pair_rows);
  [[nodiscard]] absl::StatusOr<DeviceMatrix> PackStoredDense(const StoredMatrix& matrix);
  [[nodiscard]] absl::StatusOr<const cuda::Real16*> Embedding();
  [[nodiscard]] absl::Status CheckShape(const DeviceMatrix& shape, bool pair_rows) const;
  // Where the device says that a tensor's value is not finite.
  [[nodiscard]] int32_t* FlagOf(const std::string& tensor);
  [[nodiscard]] absl::StatusOr<Staged> StageArea(int32_t rows, int32_t columns, int32_t group);
  [[nodiscard]] absl::Status Send(const void* from, void* to, int64_t bytes);
  [[nodiscard]] absl::StatusOr<DeviceMatrix> Pack(const Staged& staged, const DeviceMatrix& shape,
                                                  bool pair_rows);

  CudaModel* const model_;
  DeviceArena* const arena_;
  void* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
  PinnedMemory pinned_;
  uint32_t seed_ = 1;
  MatrixQueue* matrices_ = nullptr;
  std::unique_ptr<BlockSender> sender_;
  DeviceArena flags_arena_;
  int32_t* flags_ = nullptr;
  std::vector<std::string> flagged_;  // tensors, in the order of flags_
};

}  // namespace nibble::execution
