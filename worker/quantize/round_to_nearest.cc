#include "worker/quantize/round_to_nearest.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "worker/model/message.h"
#include "worker/weights/float_types.h"

namespace nibble::quantize {
namespace {

constexpr float kLevels = 15;
constexpr float kRangeMin = 1e-5f;

}  // namespace

absl::StatusOr<weights::LogicalLinear> RoundToNearest(const weights::LogicalLinear& dense,
                                                      int32_t group_size) {
  CHECK(!dense.quantized() && group_size > 0 && dense.columns % group_size == 0);
  weights::LogicalLinear result;
  result.name = dense.name;
  result.rows = dense.rows;
  result.columns = dense.columns;
  result.group_size = group_size;
  result.stored_type = weights::FloatType::kF16;
  result.bias = dense.bias;
  result.q.resize(dense.dense.size());
  result.zeros.resize(dense.dense.size() / group_size);
  result.scales.resize(result.zeros.size());
  for (size_t group = 0; group < result.zeros.size(); ++group) {
    const std::span<const float> w(dense.dense.data() + group * group_size,
                                   static_cast<size_t>(group_size));
    const auto [low, high] = std::minmax_element(w.begin(), w.end());
    const float range = std::max(*high - *low, kRangeMin);
    const float scale = weights::HalfToFloat(weights::FloatToHalf(range / kLevels));
    if (!std::isfinite(scale)) {
      return absl::InvalidArgumentError(model::Message(dense.name, ": a group spans ", range,
                                                       "; its scale is beyond fp16 (65504)"));
    }
    const float zero = std::clamp(std::nearbyint(-*low / scale), 0.0f, kLevels);
    result.scales[group] = scale;
    result.zeros[group] = static_cast<uint8_t>(zero);
    uint8_t* q = result.q.data() + group * group_size;
    for (int32_t i = 0; i < group_size; ++i) {
      q[i] = static_cast<uint8_t>(std::clamp(std::nearbyint(w[i] / scale) + zero, 0.0f, kLevels));
    }
  }
  return result;
}

}  // namespace nibble::quantize
