// AutoAWQ "gemv" and llm-awq v1: qweight [N, K/8], qzeros [N, ZW], scales [N, 8 * ZW]; plain
// nibble order along K and along the groups, whose tail is padding.
#include "base/status.h"
#include "worker/model/message.h"
#include "worker/weights/layer_tensors.h"

namespace nibble::weights {
namespace {

absl::StatusOr<LinearInfo> Describe(const LayerTensors& layer, int32_t config_group) {
  RETURN_IF_ERROR(CheckTensor(layer, layer.qweight, "qweight", 2));
  RETURN_IF_ERROR(CheckTensor(layer, layer.qzeros, "qzeros", 2));
  RETURN_IF_ERROR(CheckTensor(layer, layer.scales, "scales", 2));
  RETURN_IF_ERROR(CheckType(layer.qweight, TensorType::kI32));
  RETURN_IF_ERROR(CheckType(layer.qzeros, TensorType::kI32));
  const int64_t rows = layer.qweight.view->shape[0];
  const int64_t columns = 8 * layer.qweight.view->shape[1];
  const int64_t group = config_group < 0 ? columns : config_group;
  if (group == 0 || columns % group != 0) {
    return TensorError(layer.qweight, model::Message("group size ", group, " does not divide ",
                                                     columns, " columns"));
  }
  const int64_t words = PaddedZeroWords(columns / group, group);
  RETURN_IF_ERROR(CheckShape(layer.qzeros, {rows, words}));
  RETURN_IF_ERROR(CheckShape(layer.scales, {rows, 8 * words}));
  LinearInfo info{.layout = Layout::kGemv,
                  .rows = static_cast<int32_t>(rows),
                  .columns = static_cast<int32_t>(columns)};
  ASSIGN_OR_RETURN(info.group_size, GroupSizeOf(layer.scales, columns, columns / group));
  ASSIGN_OR_RETURN(info.stored_type, FloatTypeOf(layer.scales));
  return info;
}

absl::Status Read(const LayerTensors& layer, LogicalLinear* linear) {
  const int64_t rows = linear->rows;
  const int64_t groups = linear->group_count();
  const int64_t words = layer.qzeros.view->shape[1];
  const int64_t count = rows * linear->columns;
  linear->q.resize(count);
  for (int64_t i = 0; i < count; i += 8) {
    const uint32_t word = Word32(*layer.qweight.view, i / 8);
    for (int j = 0; j < 8; ++j) linear->q[i + j] = static_cast<uint8_t>(word >> (4 * j) & 15);
  }
  ASSIGN_OR_RETURN(const std::vector<float> scales, ReadFloats(layer.scales));
  linear->zeros.resize(rows * groups);
  linear->scales.resize(rows * groups);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t g = 0; g < groups; ++g) {
      const uint32_t word = Word32(*layer.qzeros.view, n * words + g / 8);
      linear->zeros[n * groups + g] = static_cast<uint8_t>(word >> (4 * (g % 8)) & 15);
      linear->scales[n * groups + g] = scales[n * words * 8 + g];
    }
  }
  return absl::OkStatus();
}

}  // namespace

const LayoutReader kGemvReader = {Layout::kGemv, &Describe, &Read};

}  // namespace nibble::weights
