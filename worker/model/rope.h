// The rotary settings of config.json, in both of the forms that transformers has written.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "worker/model/config_reader.h"
#include "worker/model/model_spec.h"

namespace nibble::model {

// Reads `rope_theta` and `rope_scaling`, or the newer `rope_parameters`, which holds both.
// INVALID_ARGUMENT names the key, its value and what is allowed.
[[nodiscard]] absl::StatusOr<RopeSpec> ParseRope(const ConfigReader& config, int32_t max_position);

}  // namespace nibble::model
