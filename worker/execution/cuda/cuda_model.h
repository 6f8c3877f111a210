// One rank's weights on a device, packed for the kernels.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/element.h"
#include "worker/execution/cuda/device_memory.h"
#include "worker/model/model_spec.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/rank_weights.h"
#include "worker/weights/shard.h"

namespace nibble::execution {

// Slabs as in kernels/layout/gpu_w4.h. Borrowed.
struct DeviceMatrix {
  const uint8_t* slabs = nullptr;
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t group = 0;                   // 0 = dense, of the model's element type
  const cuda::Real16* bias = nullptr;  // [rows] in packed order
  int64_t bytes = 0;                   // of the slabs
};

struct DeviceLayer {
  DeviceMatrix qkv;      // [(heads + 2 * kv_heads) * head_dim, hidden]
  DeviceMatrix o;        // [hidden, heads * head_dim]
  DeviceMatrix gate_up;  // [2 * ffn, hidden]: tiles of eight gate and the matching eight up rows
  DeviceMatrix down;     // [hidden, ffn]
  const cuda::Real16* attention_norm = nullptr;
  const cuda::Real16* mlp_norm = nullptr;
  const cuda::Real16* q_norm = nullptr;
  const cuda::Real16* k_norm = nullptr;
  int32_t window = 0;  // 0 = all positions are seen
};

// Every matrix of a rank's share, as its packed form will be.
struct ModelFormats {
  std::vector<weights::LayerFormats> layers;
  weights::PackedFormat head;
};
[[nodiscard]] absl::StatusOr<ModelFormats> DescribeFormats(const weights::Checkpoint& checkpoint,
                                                           const weights::RankShare& share);
// Every linear layer AWQ with `group`, the head dense.
[[nodiscard]] ModelFormats RandomFormats(const model::ModelSpec& spec,
                                         const weights::RankShare& share, int32_t group);

// Immutable after it is made.
class CudaModel {
 public:
  using Progress = std::function<void(int64_t bytes_done)>;

  // Threads read matrices; this one sends them through pinned memory and packs them on the device.
  // INVALID_ARGUMENT names a value or a shape that the kernels do not hold.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<CudaModel>> Load(
      const weights::Checkpoint& checkpoint, const weights::RankShare& share, int32_t max_context,
      cuda::Element element, const Progress& progress);

  // Random weights of those shapes, without a checkpoint: for measuring.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<CudaModel>> Random(
      const model::ModelSpec& spec, const weights::RankShare& share, int32_t group,
      int32_t max_context, cuda::Element element);

  // Shapes and bytes() alone, without a device: null where values would be. Element types take the
  // same memory.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<CudaModel>> Plan(
      const model::ModelSpec& spec, const weights::RankShare& share, const ModelFormats& formats,
      int32_t max_context);

  [[nodiscard]] const model::ModelSpec& spec() const { return spec_; }
  [[nodiscard]] const weights::RankShare& share() const { return share_; }
  [[nodiscard]] const std::vector<DeviceLayer>& layers() const { return layers_; }
  [[nodiscard]] const DeviceMatrix& head() const { return head_; }
  [[nodiscard]] const cuda::Real16* embedding() const { return embedding_; }
  [[nodiscard]] const cuda::Real16* final_norm() const { return final_norm_; }
  [[nodiscard]] const float* rope_cos() const { return rope_cos_; }
  [[nodiscard]] const float* rope_sin() const { return rope_sin_; }
  [[nodiscard]] cuda::Element element() const { return element_; }
  [[nodiscard]] int32_t max_context() const { return max_context_; }
  [[nodiscard]] int64_t bytes() const { return arena_.bytes(); }

 private:
  friend class ModelUpload;
  CudaModel(const model::ModelSpec& spec, const weights::RankShare& share, int32_t max_context,
            cuda::Element element, DeviceArena::Mode mode = DeviceArena::Mode::kAllocate)
      : spec_(spec),
        share_(share),
        max_context_(max_context),
        element_(element),
        arena_(mode),
        layers_(static_cast<size_t>(spec.layer_count)) {}

  const model::ModelSpec spec_;
  const weights::RankShare share_;
  const int32_t max_context_;
  const cuda::Element element_;
  DeviceArena arena_;
  std::vector<DeviceLayer> layers_;
  DeviceMatrix head_;
  const cuda::Real16* embedding_ = nullptr;   // [vocab, hidden], whole on every rank
  const cuda::Real16* final_norm_ = nullptr;  // [hidden]
  const float* rope_cos_ = nullptr;           // [max_context, head_dim / 2]
  const float* rope_sin_ = nullptr;
};

}  // namespace nibble::execution
