// One rank's weights, packed for the kernels.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/kernels.h"
#include "worker/execution/cpu/memory.h"
#include "worker/execution/cpu/packed_matrix.h"
#include "worker/model/model_spec.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/memory_plan.h"

namespace nibble::execution {

// Norm weights are fp32 [size]; nullptr where the model has none.
struct LayerShard {
  PackedMatrix qkv;      // [(heads + 2 * kv_heads) * head_dim, hidden]
  PackedMatrix o;        // [hidden, heads * head_dim]
  PackedMatrix gate_up;  // [2 * ffn, hidden]: all gates, then all ups
  PackedMatrix down;     // [hidden, ffn]
  const float* attention_norm = nullptr;
  const float* mlp_norm = nullptr;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  int32_t window = 0;  // 0 = all positions are seen
};

// Immutable after Load(); thread-safe. Copies what it needs: the checkpoint may go.
class ModelShard {
 public:
  struct LoadOptions {
    weights::MemoryOptions memory;
    int32_t max_context = 0;
    int64_t planned_bytes = 0;  // for progress
    int32_t threads = 1;        // pieces loaded side by side
    std::function<void(int64_t bytes_done, int64_t bytes_total)> progress = {};
  };
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<ModelShard>> Load(
      const weights::Checkpoint& checkpoint, const weights::RankShare& share,
      const LoadOptions& options);

  [[nodiscard]] const model::ModelSpec& spec() const { return spec_; }
  [[nodiscard]] const weights::RankShare& share() const { return share_; }
  [[nodiscard]] const std::vector<LayerShard>& layers() const { return layers_; }
  [[nodiscard]] const PackedMatrix& head() const { return head_; }
  [[nodiscard]] const float* final_norm() const { return final_norm_; }
  [[nodiscard]] const cpu::RopeArgs& rope() const { return rope_; }
  [[nodiscard]] int64_t bytes() const { return arena_.bytes(); }

  // The embedding of `token_id` [hidden]; zeros where another rank holds it.
  void Embed(int32_t token_id, float* out) const;

 private:
  ModelShard(const model::ModelSpec& spec, const weights::RankShare& share)
      : spec_(spec), share_(share), layers_(static_cast<size_t>(spec.layer_count)) {}

  [[nodiscard]] absl::Status LoadMatrices(const weights::Checkpoint& checkpoint,
                                          const LoadOptions& options);
  [[nodiscard]] absl::Status LoadLayer(const weights::Checkpoint& checkpoint,
                                       const LoadOptions& options, int32_t layer);
  [[nodiscard]] absl::Status LoadEmbedding(const weights::Checkpoint& checkpoint);
  [[nodiscard]] absl::Status LoadHead(const weights::Checkpoint& checkpoint,
                                      const LoadOptions& options);
  [[nodiscard]] absl::StatusOr<const float*> LoadNorm(const weights::Checkpoint& checkpoint,
                                                      std::string_view name, int32_t size);
  void MakeRope(int32_t max_context);

  const model::ModelSpec spec_;
  const weights::RankShare share_;
  Arena arena_;
  weights::TensorView embedding_;  // the share's rows; its data lies in arena_
  std::vector<LayerShard> layers_;
  const float* final_norm_ = nullptr;
  PackedMatrix head_;
  cpu::RopeArgs rope_;
};

}  // namespace nibble::execution
