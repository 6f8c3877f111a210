// The tensors of one linear layer, and the readers of each way to store it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/weights/logical_linear.h"
#include "worker/weights/quantization_config.h"
#include "worker/weights/safetensors.h"
#include "worker/weights/shard.h"

namespace nibble::weights {

// A tensor and where it came from, for messages. Borrowed from the checkpoint.
struct StoredTensor {
  const TensorView* view = nullptr;  // nullptr = absent
  std::string_view name;
  std::string_view file;
  [[nodiscard]] explicit operator bool() const { return view != nullptr; }
};

struct LayerTensors {
  std::string layer;         // "model.layers.0.self_attn.q_proj"
  std::string_view listing;  // the file that says which tensors there are
  StoredTensor weight;
  StoredTensor bias;
  StoredTensor qweight;
  StoredTensor qzeros;
  StoredTensor scales;
  StoredTensor scaled_zeros;
  StoredTensor weight_packed;
  StoredTensor weight_scale;
  StoredTensor weight_zero_point;
  StoredTensor weight_shape;
};

// What the headers say of a linear layer.
struct LinearInfo {
  Layout layout = Layout::kNone;  // kNone = dense
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t group_size = 0;                   // 0 = dense
  FloatType stored_type = FloatType::kF16;  // of scales, or of the dense values
  bool has_bias = false;
};

// "FILE: tensor NAME: WHAT".
[[nodiscard]] absl::Status TensorError(const StoredTensor& tensor, std::string_view what);

// INVALID_ARGUMENT unless the tensor is there, has `rank` dimensions of 1 … 2^26 and the type.
[[nodiscard]] absl::Status CheckTensor(const LayerTensors& layer, const StoredTensor& tensor,
                                       std::string_view suffix, size_t rank);
[[nodiscard]] absl::Status CheckType(const StoredTensor& tensor, TensorType type);
[[nodiscard]] absl::Status CheckShape(const StoredTensor& tensor,
                                      const std::vector<int64_t>& shape);
[[nodiscard]] absl::StatusOr<FloatType> FloatTypeOf(const StoredTensor& tensor);

// The tensor's values widened to fp32, in stored order. DATA_LOSS names the tensor and the place
// of a value that is not finite. REQUIRES: a float type.
[[nodiscard]] absl::StatusOr<std::vector<float>> ReadFloats(const StoredTensor& tensor);

// Word `index` of a packed tensor, whose data may lie at any address.
[[nodiscard]] inline uint32_t Word32(const TensorView& view, int64_t index) {
  uint32_t word = 0;
  std::memcpy(&word, view.data.data() + index * 4, sizeof(word));
  return word;
}
[[nodiscard]] inline uint16_t Word16(const TensorView& view, int64_t index) {
  uint16_t word = 0;
  std::memcpy(&word, view.data.data() + index * 2, sizeof(word));
  return word;
}

// columns / groups as a group size that nibble runs: a multiple of 32 that divides columns.
[[nodiscard]] absl::StatusOr<int32_t> GroupSizeOf(const StoredTensor& tensor, int64_t columns,
                                                  int64_t groups);

// [groups, rows] -> [rows, groups].
[[nodiscard]] std::vector<float> TransposeGroups(const std::vector<float>& stored, int64_t groups,
                                                 int64_t rows);

// Width of the padded group tensors of gemv and gemv_fast, in words of 8 groups.
[[nodiscard]] int64_t PaddedZeroWords(int64_t groups, int64_t group_size);

// Each layout: Describe checks types and shapes; Read fills q, zeros and scales of *linear, whose
// name, sizes and group_size are already set from the info.
// config_group: QuantizationConfig::group_size, for the layouts whose tensors do not tell it.
using DescribeFunction = absl::StatusOr<LinearInfo> (*)(const LayerTensors& layer,
                                                        int32_t config_group);
using ReadFunction = absl::Status (*)(const LayerTensors& layer, LogicalLinear* linear);

// Reads rows [rows.begin, rows.end) of columns [columns.begin, columns.end) of the matrix alone;
// *linear has the part's sizes. REQUIRES: what PartReadable says.
using ReadPartFunction = absl::Status (*)(const LayerTensors& layer, Range rows, Range columns,
                                          LogicalLinear* linear);

struct LayoutReader {
  Layout layout;
  DescribeFunction describe;
  ReadFunction read;
  ReadPartFunction read_part = nullptr;  // nullptr: only whole matrices are read
};

// Whether read_part takes these: rows in eights, columns in whole groups.
[[nodiscard]] inline bool PartReadable(const LayoutReader& reader, const LinearInfo& info,
                                       Range rows, Range columns) {
  return reader.read_part != nullptr && rows.begin % 8 == 0 && rows.end % 8 == 0 &&
         columns.begin % info.group_size == 0 && columns.end % info.group_size == 0;
}

extern const LayoutReader kGemmReader;
extern const LayoutReader kGemvReader;
extern const LayoutReader kGemvFastReader;
extern const LayoutReader kLlmAwqReader;
extern const LayoutReader kMarlinReader;
extern const LayoutReader kCompressedTensorsReader;
extern const LayoutReader kDenseReader;

// Decides by which tensors exist and their shapes. NOT_FOUND when there is no such layer;
// UNIMPLEMENTED names a format that is refused (GPTQ).
[[nodiscard]] absl::StatusOr<const LayoutReader*> ChooseReader(const LayerTensors& layer);

}  // namespace nibble::weights
