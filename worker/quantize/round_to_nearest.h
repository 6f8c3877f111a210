// The quantizer of AWQ: asymmetric, 4 bits, a scale and a zero point per row and group.
#pragma once

#include <cstdint>
#include <span>

#include "absl/status/statusor.h"
#include "worker/weights/logical_linear.h"

namespace nibble::quantize {

// In fp32, over the true minimum and maximum of each group:
//   s = fp16(max(max - min, 1e-5) / 15), from here on widened to fp32
//   z = clamp(round_half_even(-min / s), 0, 15)
//   q = clamp(round_half_even(w / s) + z, 0, 15)
// INVALID_ARGUMENT names the layer whose scale is beyond fp16. REQUIRES: a dense matrix whose
// columns group_size divides. The bias is kept.
[[nodiscard]] absl::StatusOr<weights::LogicalLinear> RoundToNearest(
    const weights::LogicalLinear& dense, int32_t group_size);

}  // namespace nibble::quantize
