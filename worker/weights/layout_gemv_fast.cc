// AutoAWQ "gemv_fast" and llm-awq v2: qweight int16 [N/4, K] in tiles of 4 rows x 64 columns,
// scales and -(scale * zero) as floats [8 * ZW, N]. The zeros tensor is called qzeros by the
// first, scaled_zeros by the second.
#include <cmath>

#include "base/status.h"
#include "worker/model/message.h"
#include "worker/weights/layer_tensors.h"
#include "worker/weights/printable.h"

namespace nibble::weights {
namespace {

using model::Message;

const StoredTensor& ZerosOf(const LayerTensors& layer) {
  return layer.scaled_zeros ? layer.scaled_zeros : layer.qzeros;
}

absl::StatusOr<LinearInfo> Describe(const LayerTensors& layer, int32_t config_group) {
  const StoredTensor& zeros = ZerosOf(layer);
  RETURN_IF_ERROR(CheckTensor(layer, layer.qweight, "qweight", 2));
  RETURN_IF_ERROR(CheckTensor(layer, zeros, layer.scaled_zeros ? "scaled_zeros" : "qzeros", 2));
  RETURN_IF_ERROR(CheckTensor(layer, layer.scales, "scales", 2));
  RETURN_IF_ERROR(CheckType(layer.qweight, TensorType::kI16));
  const int64_t rows = 4 * layer.qweight.view->shape[0];
  const int64_t columns = layer.qweight.view->shape[1];
  const int64_t group = config_group < 0 ? columns : config_group;
  if (group == 0 || columns % group != 0 || columns % 64 != 0) {
    return TensorError(
        layer.qweight,
        Message("group size ", group, " and tiles of 64 do not divide ", columns, " columns"));
  }
  const int64_t lines = 8 * PaddedZeroWords(columns / group, group);
  RETURN_IF_ERROR(CheckShape(layer.scales, {lines, rows}));
  RETURN_IF_ERROR(CheckShape(zeros, {lines, rows}));
  LinearInfo info{.layout = layer.scaled_zeros ? Layout::kLlmAwq : Layout::kGemvFast,
                  .rows = static_cast<int32_t>(rows),
                  .columns = static_cast<int32_t>(columns)};
  ASSIGN_OR_RETURN(info.group_size, GroupSizeOf(layer.scales, columns, columns / group));
  ASSIGN_OR_RETURN(info.stored_type, FloatTypeOf(layer.scales));
  RETURN_IF_ERROR(FloatTypeOf(zeros).status());
  return info;
}

// Word c of row block r holds four nibbles of row 4r + i; nibble `nibble` of it is column k.
void UnpackRows(const TensorView& packed, int64_t rows, int64_t columns, uint8_t* q) {
  for (int64_t block = 0; block < rows / 4; ++block) {
    for (int64_t c = 0; c < columns; ++c) {
      const uint16_t word = Word16(packed, block * columns + c);
      const int64_t in_tile = c % 64;
      uint8_t* row = q + (4 * block + in_tile / 16) * columns + c / 64 * 64;
      for (int nibble = 0; nibble < 4; ++nibble) {
        const int64_t e = 4 * (in_tile % 16) + nibble;
        const int64_t m = e % 8;
        const int64_t k = e / 32 * 32 + (m % 4) * 8 + (e % 32) / 8 * 2 + m / 4;
        row[k] = static_cast<uint8_t>(word >> (4 * nibble) & 15);
      }
    }
  }
}

absl::Status Read(const LayerTensors& layer, LogicalLinear* linear) {
  const StoredTensor& zeros_tensor = ZerosOf(layer);
  const int64_t rows = linear->rows;
  const int64_t groups = linear->group_count();
  linear->q.resize(rows * linear->columns);
  UnpackRows(*layer.qweight.view, rows, linear->columns, linear->q.data());
  ASSIGN_OR_RETURN(const std::vector<float> scales, ReadFloats(layer.scales));
  ASSIGN_OR_RETURN(const std::vector<float> scaled_zeros, ReadFloats(zeros_tensor));
  linear->scales = TransposeGroups(scales, groups, rows);
  linear->zeros.resize(rows * groups);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t n = 0; n < rows; ++n) {
      const float scale = scales[g * rows + n];
      const float scaled = scaled_zeros[g * rows + n];
      const float zero = scale == 0 ? -scaled : std::nearbyint(-scaled / scale);
      if (!(zero >= 0 && zero <= 15) || (scale == 0 && scaled != 0)) {
        return absl::DataLossError(Message(zeros_tensor.file, ": tensor ",
                                           Printable(zeros_tensor.name), ": value ", g * rows + n,
                                           " gives the zero point ", zero, "; allowed: 0 … 15"));
      }
      linear->zeros[n * groups + g] = static_cast<uint8_t>(zero);
    }
  }
  return absl::OkStatus();
}

}  // namespace

const LayoutReader kGemvFastReader = {Layout::kGemvFast, &Describe, &Read};
const LayoutReader kLlmAwqReader = {Layout::kLlmAwq, &Describe, &Read};

}  // namespace nibble::weights
