// AutoAWQ "marlin": qweight int32 [K/16, 2N] in the order of the Marlin kernel's fragments, scales
// [G, N] permuted, symmetric (zero = 8).
#include <cstddef>

#include "base/status.h"
#include "worker/model/message.h"
#include "worker/weights/layer_tensors.h"

namespace nibble::weights {
namespace {

absl::StatusOr<LinearInfo> Describe(const LayerTensors& layer, int32_t /*config_group*/) {
  RETURN_IF_ERROR(CheckTensor(layer, layer.qweight, "qweight", 2));
  RETURN_IF_ERROR(CheckTensor(layer, layer.scales, "scales", 2));
  RETURN_IF_ERROR(CheckType(layer.qweight, TensorType::kI32));
  const int64_t columns = 16 * layer.qweight.view->shape[0];
  const int64_t groups = layer.scales.view->shape[0];
  const int64_t rows = layer.scales.view->shape[1];
  RETURN_IF_ERROR(CheckShape(layer.qweight, {columns / 16, 2 * rows}));
  if (rows % 64 != 0) {
    return TensorError(layer.scales,
                       model::Message(rows, " rows; allowed: multiples of 64 in this layout"));
  }
  LinearInfo info{.layout = Layout::kMarlin,
                  .rows = static_cast<int32_t>(rows),
                  .columns = static_cast<int32_t>(columns)};
  ASSIGN_OR_RETURN(info.group_size, GroupSizeOf(layer.scales, columns, groups));
  ASSIGN_OR_RETURN(info.stored_type, FloatTypeOf(layer.scales));
  return info;
}

// Where the scale of row n lies within a line of scales.
int64_t ScalePlace(int64_t n, bool whole_row) {
  if (!whole_row) {  // blocks of 64: disk[8i + j] = logical[i + 8j]
    return n / 64 * 64 + 8 * (n % 8) + n % 64 / 8;
  }
  // Blocks of 32: disk[8i + t] = logical[2i + {0, 1, 8, 9, 16, 17, 24, 25}[t]].
  const int64_t m = n % 32;
  return n / 32 * 32 + 8 * (m % 8 / 2) + 2 * (m / 8) + m % 2;
}

absl::Status Read(const LayerTensors& layer, LogicalLinear* linear) {
  constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  const int64_t rows = linear->rows;
  const int64_t columns = linear->columns;
  const int64_t groups = linear->group_count();
  linear->q.resize(rows * columns);
  for (int64_t tile = 0; tile < columns / 16; ++tile) {
    for (int64_t w = 0; w < 2 * rows; ++w) {
      const uint32_t word = Word32(*layer.qweight.view, tile * 2 * rows + w);
      const int64_t lane = w % 128 / 4;
      for (int nibble = 0; nibble < 8; ++nibble) {
        const int half = kOrder[nibble] / 4;
        const int r = kOrder[nibble] % 4;
        const int64_t n = w / 128 * 64 + 16 * (w % 4) + 8 * half + lane / 4;
        const int64_t k = 16 * tile + 2 * (lane % 4) + r % 2 + 8 * (r / 2);
        linear->q[n * columns + k] = static_cast<uint8_t>(word >> (4 * nibble) & 15);
      }
    }
  }
  ASSIGN_OR_RETURN(const std::vector<float> scales, ReadFloats(layer.scales));
  linear->zeros.assign(rows * groups, 8);
  linear->scales.resize(rows * groups);
  for (int64_t n = 0; n < rows; ++n) {
    const int64_t place = ScalePlace(n, groups == 1);
    for (int64_t g = 0; g < groups; ++g) {
      linear->scales[n * groups + g] = scales[g * rows + place];
    }
  }
  return absl::OkStatus();
}

}  // namespace

const LayoutReader kMarlinReader = {Layout::kMarlin, &Describe, &Read};

}  // namespace nibble::weights
