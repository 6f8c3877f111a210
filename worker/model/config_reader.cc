#include "worker/model/config_reader.h"

#include <cmath>

#include "base/check.h"
#include "worker/model/message.h"

namespace nibble::model {

std::string DescribeValue(const nlohmann::json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return Message("an array of ", value.size());
  constexpr size_t kLongest = 60;
  std::string text = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "…";
  return text;
}

absl::Status BadValue(std::string_view where, std::string_view key, const nlohmann::json& value,
                      std::string_view allowed) {
  return absl::InvalidArgumentError(
      Message(where, ": ", key, " is ", DescribeValue(value), "; allowed: ", allowed));
}

ConfigReader::ConfigReader(const nlohmann::json& object, std::string_view where)
    : object_(object), where_(where) {
  CHECK(object.is_object());
}

const nlohmann::json* ConfigReader::Find(std::string_view key) const {
  const auto found = object_.find(key);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

bool ConfigReader::HasNull(std::string_view key) const {
  const auto found = object_.find(key);
  return found != object_.end() && found->is_null();
}

absl::Status ConfigReader::Missing(std::string_view key, std::string_view allowed) const {
  return absl::InvalidArgumentError(Message(where_, ": ", key, " is missing; allowed: ", allowed));
}

absl::StatusOr<int32_t> ConfigReader::Int(std::string_view key, IntRange range,
                                          std::optional<int32_t> fallback) const {
  const std::string allowed = Message("an integer ", range.low, " … ", range.high);
  const nlohmann::json* value = Find(key);
  if (value == nullptr) {
    if (fallback.has_value()) return *fallback;
    return Missing(key, allowed);
  }
  if (!value->is_number_integer()) return BadValue(where_, key, *value, allowed);
  if (value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
    return BadValue(where_, key, *value, allowed);
  }
  const auto number = value->get<int64_t>();
  if (number < range.low || number > range.high) return BadValue(where_, key, *value, allowed);
  return static_cast<int32_t>(number);
}

absl::StatusOr<float> ConfigReader::Float(std::string_view key, FloatRange range,
                                          std::optional<float> fallback) const {
  const std::string allowed = Message("a number ", range.low, " … ", range.high);
  const nlohmann::json* value = Find(key);
  if (value == nullptr) {
    if (fallback.has_value()) return *fallback;
    return Missing(key, allowed);
  }
  if (!value->is_number()) return BadValue(where_, key, *value, allowed);
  const auto number = value->get<double>();
  if (!std::isfinite(number) || number < range.low || number > range.high) {
    return BadValue(where_, key, *value, allowed);
  }
  return static_cast<float>(number);
}

absl::StatusOr<bool> ConfigReader::Bool(std::string_view key, bool fallback) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) return BadValue(where_, key, *value, "true, false");
  return value->get<bool>();
}

absl::StatusOr<std::string> ConfigReader::String(std::string_view key,
                                                 std::string_view fallback) const {
  const nlohmann::json* value = Find(key);
  if (value == nullptr) return std::string(fallback);
  if (!value->is_string()) return BadValue(where_, key, *value, "a string");
  return value->get<std::string>();
}

}  // namespace nibble::model
