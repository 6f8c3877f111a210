// compressed-tensors "pack-quantized": weight_packed [N, ceil(K/8)] along K, weight_scale [N, G],
// weight_zero_point [ceil(N/8), G] along N or none (zero = 8). Values are stored plus 8, so the
// unsigned nibbles are q and z as they stand.
#include <cstring>

#include "base/status.h"
#include "worker/model/message.h"
#include "worker/weights/layer_tensors.h"

namespace nibble::weights {
namespace {

using model::Message;

// weight_shape's two values.
absl::StatusOr<std::vector<int64_t>> ReadShape(const LayerTensors& layer) {
  const StoredTensor& tensor = layer.weight_shape;
  RETURN_IF_ERROR(CheckTensor(layer, tensor, "weight_shape", 1));
  RETURN_IF_ERROR(CheckShape(tensor, {2}));
  std::vector<int64_t> shape(2);
  if (tensor.view->type == TensorType::kI64) {
    std::memcpy(shape.data(), tensor.view->data.data(), 16);
  } else {
    RETURN_IF_ERROR(CheckType(tensor, TensorType::kI32));
    for (int i = 0; i < 2; ++i) shape[i] = static_cast<int32_t>(Word32(*tensor.view, i));
  }
  for (const int64_t size : shape) {
    if (size < 1 || size > 1 << 26) {
      return TensorError(tensor, Message("holds ", size, "; allowed: 1 … ", 1 << 26));
    }
  }
  return shape;
}

absl::StatusOr<LinearInfo> Describe(const LayerTensors& layer, int32_t /*config_group*/) {
  RETURN_IF_ERROR(CheckTensor(layer, layer.weight_packed, "weight_packed", 2));
  RETURN_IF_ERROR(CheckTensor(layer, layer.weight_scale, "weight_scale", 2));
  RETURN_IF_ERROR(CheckType(layer.weight_packed, TensorType::kI32));
  ASSIGN_OR_RETURN(const std::vector<int64_t> shape, ReadShape(layer));
  const int64_t rows = shape[0];
  const int64_t columns = shape[1];
  const int64_t groups = layer.weight_scale.view->shape[1];
  RETURN_IF_ERROR(CheckShape(layer.weight_packed, {rows, (columns + 7) / 8}));
  RETURN_IF_ERROR(CheckShape(layer.weight_scale, {rows, groups}));
  if (layer.weight_zero_point) {
    RETURN_IF_ERROR(CheckTensor(layer, layer.weight_zero_point, "weight_zero_point", 2));
    RETURN_IF_ERROR(CheckType(layer.weight_zero_point, TensorType::kI32));
    RETURN_IF_ERROR(CheckShape(layer.weight_zero_point, {(rows + 7) / 8, groups}));
  }
  LinearInfo info{.layout = Layout::kCompressedTensors,
                  .rows = static_cast<int32_t>(rows),
                  .columns = static_cast<int32_t>(columns)};
  ASSIGN_OR_RETURN(info.group_size, GroupSizeOf(layer.weight_scale, columns, groups));
  ASSIGN_OR_RETURN(info.stored_type, FloatTypeOf(layer.weight_scale));
  return info;
}

absl::Status Read(const LayerTensors& layer, LogicalLinear* linear) {
  const int64_t rows = linear->rows;
  const int64_t columns = linear->columns;
  const int64_t groups = linear->group_count();
  linear->q.resize(rows * columns);
  // Groups are multiples of 32, so columns fill whole words.
  for (int64_t i = 0; i < rows * columns; i += 8) {
    const uint32_t word = Word32(*layer.weight_packed.view, i / 8);
    for (int j = 0; j < 8; ++j) linear->q[i + j] = static_cast<uint8_t>(word >> (4 * j) & 15);
  }
  ASSIGN_OR_RETURN(linear->scales, ReadFloats(layer.weight_scale));
  linear->zeros.assign(rows * groups, 8);
  if (!layer.weight_zero_point) return absl::OkStatus();
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      const uint32_t word = Word32(*layer.weight_zero_point.view, n / 8 * groups + g);
      linear->zeros[n * groups + g] = static_cast<uint8_t>(word >> (4 * (n % 8)) & 15);
    }
  }
  return absl::OkStatus();
}

}  // namespace

const LayoutReader kCompressedTensorsReader = {Layout::kCompressedTensors, &Describe, &Read};

}  // namespace nibble::weights
