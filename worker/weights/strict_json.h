// JSON files of a model folder, checked for what a parser alone lets through.
#pragma once

#include <string_view>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace nibble::weights {

inline constexpr int kConfigDepthMax = 32;

// Refuses, besides malformed text: nesting deeper than depth_max, a key twice in one object, a
// byte-order mark, numbers that do not fit. INVALID_ARGUMENT begins with `source`, the file's name.
[[nodiscard]] absl::StatusOr<nlohmann::json> ParseStrictJson(std::string_view text,
                                                             std::string_view source,
                                                             int depth_max = kConfigDepthMax);

}  // namespace nibble::weights
