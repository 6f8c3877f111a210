// A model folder: config.json, generation_config.json, tokenizer files and the
// safetensors files, opened beneath the folder only and validated before use.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "worker/model/model_spec.h"
#include "worker/weights/layer_tensors.h"
#include "worker/weights/logical_linear.h"
#include "worker/weights/model_folder.h"
#include "worker/weights/quantization_config.h"
#include "worker/weights/safetensors.h"
#include "worker/weights/shard.h"

namespace nibble::weights {

// Thread-safe after Open(). Tensor data stays mapped for the object's life.
class Checkpoint {
 public:
  // INVALID_ARGUMENT or DATA_LOSS names the file and the tensor; UNIMPLEMENTED a format that is
  // recognised and refused (8-bit, GPTQ, act-order).
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& folder);

  [[nodiscard]] const nlohmann::json& config() const { return config_; }
  [[nodiscard]] const nlohmann::json& generation_config() const { return generation_config_; }
  [[nodiscard]] const model::ModelSpec& spec() const { return spec_; }
  [[nodiscard]] const QuantizationConfig& quantization() const { return quantization_; }
  [[nodiscard]] const std::string& folder() const { return folder_; }
  [[nodiscard]] const std::vector<std::unique_ptr<SafetensorsFile>>& files() const {
    return files_;
  }

  // nullptr when absent.
  [[nodiscard]] const TensorView* Find(std::string_view name) const;
  [[nodiscard]] std::vector<std::string> TensorNames() const;

  // What the headers say of the linear layer `name`: checked against the other tensors of the
  // layer, the ModelSpec and the quantization config, without reading any value.
  [[nodiscard]] absl::StatusOr<LinearInfo> DescribeLinear(std::string_view name) const;
  [[nodiscard]] absl::StatusOr<LinearInfo> DescribeHead() const;
  // The stored type of a dense tensor of that shape.
  [[nodiscard]] absl::StatusOr<FloatType> DescribeDense(std::string_view name,
                                                        const std::vector<int64_t>& shape) const;

  // The linear layer `name` in logical form, whichever way it is stored; decided per layer by
  // which tensors exist.
  [[nodiscard]] absl::StatusOr<LogicalLinear> LoadLinear(std::string_view name) const;
  // SliceRows and SliceColumns of it, without reading more than that where the layout allows.
  [[nodiscard]] absl::StatusOr<LogicalLinear> LoadLinearRows(std::string_view name,
                                                             Range rows) const;
  [[nodiscard]] absl::StatusOr<LogicalLinear> LoadLinearColumns(std::string_view name,
                                                                Range columns) const;

  // The output head: lm_head, or the embedding where the two are tied.
  [[nodiscard]] absl::StatusOr<LogicalLinear> LoadHead() const;

  // A vector (norm weight) or matrix (embedding), widened to fp32; shape checked.
  [[nodiscard]] absl::StatusOr<std::vector<float>> LoadDense(
      std::string_view name, const std::vector<int64_t>& shape) const;

  // A small text file of the folder ("tokenizer.json"); NOT_FOUND when absent.
  [[nodiscard]] absl::StatusOr<std::string> ReadFile(std::string_view name, int64_t size_max) const;

  // SHA-256-free identity: a hash of config and of every tensor's name, type and shape, compared
  // by the ranks of a group and by the gateway across groups.
  [[nodiscard]] uint64_t IdentityHash() const;

 private:
  Checkpoint() = default;

  std::string folder_;
  nlohmann::json config_;
  nlohmann::json generation_config_;
  model::ModelSpec spec_;
  QuantizationConfig quantization_;
  ModelFolder root_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  struct Index;
  std::shared_ptr<const Index> index_;
  std::string_view listing_;  // the file that says which tensors there are

  [[nodiscard]] absl::Status OpenWeights();
  [[nodiscard]] absl::Status BuildIndex();
  [[nodiscard]] StoredTensor Stored(std::string_view name) const;
  [[nodiscard]] LayerTensors TensorsOf(std::string_view layer) const;
  [[nodiscard]] absl::Status CheckAgainstConfig(std::string_view layer, const LinearInfo& info,
                                                const StoredTensor& tensor) const;
  // Nothing where the layout reads whole matrices only.
  [[nodiscard]] absl::StatusOr<std::optional<LogicalLinear>> LoadPart(
      std::string_view name, std::optional<Range> rows, std::optional<Range> columns) const;
  [[nodiscard]] absl::Status LoadBias(const LayerTensors& tensors, LogicalLinear* linear) const;
};

}  // namespace nibble::weights
