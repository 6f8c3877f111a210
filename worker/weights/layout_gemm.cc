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

// Lines and words [begin, end) of [any, row_words] words of eight interleaved nibbles ->
// [8 * words, lines]. In tiles, so that both the lines read and the rows written stay in the cache.
void UnpackTransposed(const TensorView& packed, int64_t row_words, Range lines, Range words,
                      uint8_t* out) {
  constexpr int64_t kTileLines = 64;
  constexpr int64_t kTileWords = 16;
  const int64_t line_count = lines.count();
  for (int64_t w0 = words.begin; w0 < words.end; w0 += kTileWords) {
    const int64_t w1 = std::min<int64_t>(words.end, w0 + kTileWords);
    for (int64_t k0 = lines.begin; k0 < lines.end; k0 += kTileLines) {
      const int64_t k1 = std::min<int64_t>(lines.end, k0 + kTileLines);
      for (int64_t k = k0; k < k1; ++k) {
        for (int64_t w = w0; w < w1; ++w) {
          const uint32_t word = Word32(packed, k * row_words + w);
          uint8_t* column = out + 8 * (w - words.begin) * line_count + (k - lines.begin);
          for (int j = 0; j < 8; ++j) {
            column[j * line_count] = static_cast<uint8_t>(word >> (4 * kNibble[j]) & 15);
          }
        }
      }
    }
  }
}

absl::Status ReadPart(const LayerTensors& layer, Range rows, Range columns, LogicalLinear* linear) {
  const int64_t row_words = layer.qweight.view->shape[1];
  const Range words = {rows.begin / 8, rows.end / 8};
  const Range groups = {columns.begin / linear->group_size, columns.end / linear->group_size};
  linear->q.resize(static_cast<size_t>(linear->rows) * linear->columns);
  linear->zeros.resize(static_cast<size_t>(linear->rows) * groups.count());
  UnpackTransposed(*layer.qweight.view, row_words, columns, words, linear->q.data());
  UnpackTransposed(*layer.qzeros.view, row_words, groups, words, linear->zeros.data());
  // All of them are read: a part's owner refuses the file for any that is not finite.
  ASSIGN_OR_RETURN(const std::vector<float> scales, ReadFloats(layer.scales));
  linear->scales.resize(linear->zeros.size());
  for (int64_t g = groups.begin; g < groups.end; ++g) {
    for (int64_t n = rows.begin; n < rows.end; ++n) {
      linear->scales[(n - rows.begin) * groups.count() + (g - groups.begin)] =
          scales[g * 8 * row_words + n];
    }
  }
  return absl::OkStatus();
}

absl::Status Read(const LayerTensors& layer, LogicalLinear* linear) {
  return ReadPart(layer, {0, linear->rows}, {0, linear->columns}, linear);
}

}  // namespace

const LayoutReader kGemmReader = {Layout::kGemm, &Describe, &Read, &ReadPart};

}  // namespace nibble::weights
