// AutoAWQ "gemm": qweight [K, N/8], qzeros [G, N/8], scales [G, N]; nibbles interleaved along N.
#include <algorithm>

#include "base/status.h"
#include "worker/weights/layer_tensors.h"

namespace nibble::weights {
namespace {

// Logical column 8c + j sits in nibble kNibble[j] of word c.
constexpr int kNibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

absl::StatusOr<LinearInfo> Describe(const LayerTensors& layer, int32_t /*config_group*/) {
  RETURN_IF_ERROR(CheckTensor(layer, layer.qweight, "qweight", 2));
  RETURN_IF_ERROR(CheckTensor(layer, layer.qzeros, "qzeros", 2));
  RETURN_IF_ERROR(CheckTensor(layer, layer.scales, "scales", 2));
  RETURN_IF_ERROR(CheckType(layer.qweight, TensorType::kI32));
  RETURN_IF_ERROR(CheckType(layer.qzeros, TensorType::kI32));
  const int64_t columns = layer.qweight.view->shape[0];
  const int64_t words = layer.qweight.view->shape[1];
  const int64_t groups = layer.scales.view->shape[0];
  RETURN_IF_ERROR(CheckShape(layer.qzeros, {groups, words}));
  RETURN_IF_ERROR(CheckShape(layer.scales, {groups, 8 * words}));
  LinearInfo info{.layout = Layout::kGemm,
                  .rows = static_cast<int32_t>(8 * words),
                  .columns = static_cast<int32_t>(columns)};
  ASSIGN_OR_RETURN(info.group_size, GroupSizeOf(layer.scales, columns, groups));
  ASSIGN_OR_RETURN(info.stored_type, FloatTypeOf(layer.scales));
  return info;
}

// [lines, words] of eight interleaved nibbles -> [8 * words, lines]. In tiles, so that both the
// lines read and the rows written stay in the cache.
void UnpackTransposed(const TensorView& packed, int64_t lines, int64_t words, uint8_t* out) {
  constexpr int64_t kTileLines = 64;
  constexpr int64_t kTileWords = 16;
  for (int64_t w0 = 0; w0 < words; w0 += kTileWords) {
    const int64_t w1 = std::min(words, w0 + kTileWords);
    for (int64_t k0 = 0; k0 < lines; k0 += kTileLines) {
      const int64_t k1 = std::min(lines, k0 + kTileLines);
      for (int64_t k = k0; k < k1; ++k) {
        for (int64_t w = w0; w < w1; ++w) {
          const uint32_t word = Word32(packed, k * words + w);
          uint8_t* column = out + 8 * w * lines + k;
          for (int j = 0; j < 8; ++j) {
            column[j * lines] = static_cast<uint8_t>(word >> (4 * kNibble[j]) & 15);
          }
        }
      }
    }
  }
}

absl::Status Read(const LayerTensors& layer, LogicalLinear* linear) {
  const int64_t words = linear->rows / 8;
  const int64_t groups = linear->group_count();
  linear->q.resize(static_cast<size_t>(linear->rows) * linear->columns);
  linear->zeros.resize(static_cast<size_t>(linear->rows) * groups);
  UnpackTransposed(*layer.qweight.view, linear->columns, words, linear->q.data());
  UnpackTransposed(*layer.qzeros.view, groups, words, linear->zeros.data());
  ASSIGN_OR_RETURN(const std::vector<float> scales, ReadFloats(layer.scales));
  linear->scales = TransposeGroups(scales, groups, linear->rows);
  return absl::OkStatus();
}

}  // namespace

const LayoutReader kGemmReader = {Layout::kGemm, &Describe, &Read};

}  // namespace nibble::weights
