// Typed reads of a model's JSON settings, each checked against what is allowed.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace nibble::model {

// A value for an error message: scalars as JSON (cut at 60 bytes), others by their kind.
[[nodiscard]] std::string DescribeValue(const nlohmann::json& value);

// INVALID_ARGUMENT "config.json: KEY is VALUE; allowed: ALLOWED".
[[nodiscard]] absl::Status BadValue(std::string_view where, std::string_view key,
                                    const nlohmann::json& value, std::string_view allowed);

// Reads one JSON object, which it borrows. A key that is null counts as absent. Errors are
// INVALID_ARGUMENT and name the key, its value and what is allowed.
class ConfigReader {
 public:
  // `where` begins every message: "config.json" or "config.json: rope_scaling".
  // REQUIRES: object.is_object().
  ConfigReader(const nlohmann::json& object, std::string_view where);

  [[nodiscard]] bool Has(std::string_view key) const { return Find(key) != nullptr; }
  // True where the key is there and null.
  [[nodiscard]] bool HasNull(std::string_view key) const;
  // nullptr when absent or null.
  [[nodiscard]] const nlohmann::json* Find(std::string_view key) const;

  struct IntRange {
    int64_t low = 0;
    int64_t high = 0;
  };
  struct FloatRange {
    double low = 0;
    double high = 0;
  };
  // Without a fallback the key must be there.
  [[nodiscard]] absl::StatusOr<int32_t> Int(std::string_view key, IntRange range,
                                            std::optional<int32_t> fallback = {}) const;
  [[nodiscard]] absl::StatusOr<float> Float(std::string_view key, FloatRange range,
                                            std::optional<float> fallback = {}) const;
  [[nodiscard]] absl::StatusOr<bool> Bool(std::string_view key, bool fallback) const;
  [[nodiscard]] absl::StatusOr<std::string> String(std::string_view key,
                                                   std::string_view fallback) const;

  [[nodiscard]] absl::Status Missing(std::string_view key, std::string_view allowed) const;
  [[nodiscard]] const std::string& where() const { return where_; }

 private:
  const nlohmann::json& object_;
  std::string where_;
};

}  // namespace nibble::model
