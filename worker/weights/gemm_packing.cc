#include "worker/weights/gemm_packing.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "worker/weights/float_types.h"

namespace nibble::weights {
namespace {

// Nibble i of word c holds logical column 8c + kColumn[i].
constexpr int kColumn[8] = {0, 2, 4, 6, 1, 3, 5, 7};

// [8 * words, lines] -> [lines, words]. In tiles, so that rows read and lines written stay cached.
std::vector<std::byte> PackTransposed(const std::vector<uint8_t>& values, int64_t lines,
                                      int64_t words) {
  constexpr int64_t kTileLines = 64;
  constexpr int64_t kTileWords = 16;
  std::vector<std::byte> packed(lines * words * 4);
  for (int64_t w0 = 0; w0 < words; w0 += kTileWords) {
    const int64_t w1 = std::min(words, w0 + kTileWords);
    for (int64_t k0 = 0; k0 < lines; k0 += kTileLines) {
      const int64_t k1 = std::min(lines, k0 + kTileLines);
      for (int64_t k = k0; k < k1; ++k) {
        for (int64_t w = w0; w < w1; ++w) {
          const uint8_t* column = values.data() + 8 * w * lines + k;
          uint32_t word = 0;
          for (int i = 0; i < 8; ++i) {
            word |= static_cast<uint32_t>(column[kColumn[i] * lines]) << (4 * i);
          }
          std::memcpy(packed.data() + (k * words + w) * 4, &word, sizeof(word));
        }
      }
    }
  }
  return packed;
}

}  // namespace

std::vector<TensorPlan> PlanGemm(const std::string& name, int32_t rows, int32_t columns,
                                 int32_t group_size) {
  CHECK(rows % kGemmRowUnit == 0 && columns % group_size == 0);
  const int64_t words = rows / kGemmRowUnit;
  const int64_t groups = columns / group_size;
  return {{name + ".qweight", TensorType::kI32, {columns, words}},
          {name + ".qzeros", TensorType::kI32, {groups, words}},
          {name + ".scales", TensorType::kF16, {groups, rows}}};
}

std::vector<std::vector<std::byte>> PackGemm(const LogicalLinear& linear) {
  CHECK(linear.quantized() && linear.rows % kGemmRowUnit == 0);
  const int64_t words = linear.rows / kGemmRowUnit;
  const int64_t groups = linear.group_count();
  std::vector<std::byte> scales(static_cast<size_t>(linear.rows) * groups * 2);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t n = 0; n < linear.rows; ++n) {
      const uint16_t half = FloatToHalf(linear.scales[n * groups + g]);
      std::memcpy(scales.data() + (g * linear.rows + n) * 2, &half, sizeof(half));
    }
  }
  return {PackTransposed(linear.q, linear.columns, words),
          PackTransposed(linear.zeros, groups, words), std::move(scales)};
}

}  // namespace nibble::weights
