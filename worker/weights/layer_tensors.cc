#include "worker/weights/layer_tensors.h"

#include <cmath>
#include <cstring>

#include "base/check.h"
#include "base/status.h"
#include "worker/model/message.h"
#include "worker/weights/float_types.h"
#include "worker/weights/printable.h"

namespace nibble::weights {
namespace {

using model::Message;

constexpr int64_t kDimensionMax = 1 << 26;

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t dimension : shape) {
    text += Message(text.size() > 1 ? ", " : "", dimension);
  }
  return text + "]";
}

absl::Status RefusedFormat(const StoredTensor& tensor, std::string_view format) {
  return absl::UnimplementedError(Message(tensor.file, ": tensor ", Printable(tensor.name), ": ",
                                          format,
                                          " weights are not supported; allowed: 4-bit AWQ"));
}

absl::StatusOr<const LayoutReader*> ChooseQweightReader(const LayerTensors& layer) {
  const TensorType type = layer.qweight.view->type;
  if (type == TensorType::kU8 || type == TensorType::kI8) {
    return RefusedFormat(layer.qweight, "8-bit");
  }
  if (layer.scaled_zeros) return &kLlmAwqReader;
  if (type == TensorType::kI16) return &kGemvFastReader;
  RETURN_IF_ERROR(CheckTensor(layer, layer.qweight, "qweight", 2));
  RETURN_IF_ERROR(CheckType(layer.qweight, TensorType::kI32));
  RETURN_IF_ERROR(CheckTensor(layer, layer.scales, "scales", 2));
  const std::vector<int64_t>& weight = layer.qweight.view->shape;
  const std::vector<int64_t>& scales = layer.scales.view->shape;
  if (!layer.qzeros && weight[1] == 2 * scales[1]) return &kMarlinReader;
  RETURN_IF_ERROR(CheckTensor(layer, layer.qzeros, "qzeros", 2));
  const std::vector<int64_t>& zeros = layer.qzeros.view->shape;
  // Which dimensions agree tells the layouts apart: gemm packs weights and zeros along N, gemv
  // keeps N first everywhere, GPTQ packs weights along K and zeros along N.
  if (zeros[1] == weight[1] && scales[1] == 8 * weight[1]) return &kGemmReader;
  if (zeros[0] == weight[0] && scales[0] == weight[0]) return &kGemvReader;
  if (scales[1] == weight[1] && zeros[1] * 8 == weight[1]) {
    return RefusedFormat(layer.qweight, "GPTQ");
  }
  if (zeros[1] == weight[1] && scales[1] == 4 * weight[1]) {
    return RefusedFormat(layer.qweight, "8-bit");
  }
  return TensorError(layer.qweight,
                     Message("shape ", ShapeText(weight), " with qzeros ", ShapeText(zeros),
                             " and scales ", ShapeText(scales), " is no AWQ layout"));
}

}  // namespace

absl::Status TensorError(const StoredTensor& tensor, std::string_view what) {
  return absl::InvalidArgumentError(
      Message(tensor.file, ": tensor ", Printable(tensor.name), ": ", what));
}

absl::Status CheckTensor(const LayerTensors& layer, const StoredTensor& tensor,
                         std::string_view suffix, size_t rank) {
  if (!tensor) {
    return absl::InvalidArgumentError(Message(
        layer.listing, ": tensor ", Printable(Message(layer.layer, ".", suffix)), " is missing"));
  }
  const std::vector<int64_t>& shape = tensor.view->shape;
  bool fits = shape.size() == rank;
  for (const int64_t dimension : shape) fits = fits && dimension >= 1 && dimension <= kDimensionMax;
  if (fits) return absl::OkStatus();
  return TensorError(tensor, Message("shape is ", ShapeText(shape), "; allowed: ", rank,
                                     " dimensions of 1 … ", kDimensionMax));
}

absl::Status CheckType(const StoredTensor& tensor, TensorType type) {
  if (tensor.view->type == type) return absl::OkStatus();
  return TensorError(tensor, Message("type is ", TensorTypeName(tensor.view->type),
                                     "; allowed: ", TensorTypeName(type)));
}

absl::Status CheckShape(const StoredTensor& tensor, const std::vector<int64_t>& shape) {
  if (tensor.view->shape == shape) return absl::OkStatus();
  return TensorError(
      tensor, Message("shape is ", ShapeText(tensor.view->shape), "; allowed: ", ShapeText(shape)));
}

absl::StatusOr<FloatType> FloatTypeOf(const StoredTensor& tensor) {
  switch (tensor.view->type) {
    case TensorType::kF16:
      return FloatType::kF16;
    case TensorType::kBF16:
      return FloatType::kBF16;
    case TensorType::kF32:
      return FloatType::kF32;
    default:
      return TensorError(tensor, Message("type is ", TensorTypeName(tensor.view->type),
                                         "; allowed: F16, BF16, F32"));
  }
}

absl::StatusOr<std::vector<float>> ReadFloats(const StoredTensor& tensor) {
  const TensorView& view = *tensor.view;
  const int64_t count = static_cast<int64_t>(view.data.size()) / TensorTypeBytes(view.type);
  std::vector<float> values(count);
  switch (view.type) {
    case TensorType::kF16:
      for (int64_t i = 0; i < count; ++i) values[i] = HalfToFloat(Word16(view, i));
      break;
    case TensorType::kBF16:
      for (int64_t i = 0; i < count; ++i) values[i] = BFloatToFloat(Word16(view, i));
      break;
    default:
      CHECK(view.type == TensorType::kF32);
      if (count > 0) std::memcpy(values.data(), view.data.data(), view.data.size());
  }
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(values[i])) [[unlikely]] {
      return absl::DataLossError(Message(tensor.file, ": tensor ", Printable(tensor.name),
                                         ": value ", i, " is not finite"));
    }
  }
  return values;
}

absl::StatusOr<int32_t> GroupSizeOf(const StoredTensor& tensor, int64_t columns, int64_t groups) {
  if (groups < 1 || columns % groups != 0) {
    return TensorError(tensor, Message(groups, " groups do not divide ", columns, " columns"));
  }
  const int64_t group = columns / groups;
  if (group % 32 != 0) {
    return absl::UnimplementedError(Message(tensor.file, ": tensor ", Printable(tensor.name),
                                            ": group size is ", group,
                                            "; allowed: multiples of 32"));
  }
  return static_cast<int32_t>(group);
}

std::vector<float> TransposeGroups(const std::vector<float>& stored, int64_t groups, int64_t rows) {
  std::vector<float> scales(groups * rows);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t n = 0; n < rows; ++n) scales[n * groups + g] = stored[g * rows + n];
  }
  return scales;
}

int64_t PaddedZeroWords(int64_t groups, int64_t group_size) {
  const int64_t words = (groups + 7) / 8;
  if (group_size >= 128) return words;
  if (group_size == 64) return (words + 1) / 2 * 2;
  return (words + 3) / 4 * 4;
}

absl::StatusOr<const LayoutReader*> ChooseReader(const LayerTensors& layer) {
  const int forms =
      (layer.weight ? 1 : 0) + (layer.qweight ? 1 : 0) + (layer.weight_packed ? 1 : 0);
  if (forms == 0) {
    return absl::NotFoundError(Message(layer.listing, ": layer ", Printable(layer.layer),
                                       ": none of its tensors weight, qweight and weight_packed "
                                       "is in the checkpoint"));
  }
  if (forms > 1) {
    return absl::InvalidArgumentError(
        Message(layer.listing, ": layer ", Printable(layer.layer),
                ": is stored twice; allowed: one of weight, qweight, weight_packed"));
  }
  if (layer.weight) return &kDenseReader;
  if (layer.weight_packed) return &kCompressedTensorsReader;
  return ChooseQweightReader(layer);
}

}  // namespace nibble::weights
