// A layer that is not quantized: weight [N, K] in fp16, bf16 or fp32.
#include "base/status.h"
#include "worker/weights/layer_tensors.h"

namespace nibble::weights {
namespace {

absl::StatusOr<LinearInfo> Describe(const LayerTensors& layer, int32_t /*config_group*/) {
  RETURN_IF_ERROR(CheckTensor(layer, layer.weight, "weight", 2));
  LinearInfo info{.layout = Layout::kNone,
                  .rows = static_cast<int32_t>(layer.weight.view->shape[0]),
                  .columns = static_cast<int32_t>(layer.weight.view->shape[1])};
  ASSIGN_OR_RETURN(info.stored_type, FloatTypeOf(layer.weight));
  return info;
}

absl::Status Read(const LayerTensors& layer, LogicalLinear* linear) {
  ASSIGN_OR_RETURN(linear->dense, ReadFloats(layer.weight));
  return absl::OkStatus();
}

}  // namespace

const LayoutReader kDenseReader = {Layout::kNone, &Describe, &Read};

}  // namespace nibble::weights
