// Reads TOML through toml++, which stays in this file.
#define TOML_EXCEPTIONS 0
#define TOML_ENABLE_FORMATTERS 0
#include <toml++/toml.h>

#include "absl/strings/str_cat.h"
#include "base/config.h"
#include "base/status.h"

namespace nibble {
namespace {

using Values = std::vector<std::pair<std::string, std::vector<std::string>>>;

std::optional<std::string> ScalarText(const toml::node& node) {
  if (const auto* text = node.as_string()) return text->get();
  if (const auto* number = node.as_integer()) return absl::StrCat(number->get());
  if (const auto* number = node.as_floating_point()) return absl::StrCat(number->get());
  if (const auto* flag = node.as_boolean()) return flag->get() ? "true" : "false";
  return std::nullopt;
}

absl::Status Refuse(const std::string& path, const toml::node& node, const std::string& key) {
  return absl::InvalidArgumentError(
      absl::StrCat(path, ":", node.source().begin.line, ": ", key,
                   " is neither a text, a number, true, false nor a list of these"));
}

absl::Status Flatten(const std::string& path, const toml::table& table, const std::string& prefix,
                     Values* values) {
  for (const auto& [name, node] : table) {
    const std::string key = prefix + std::string(name.str());
    if (const auto* inner = node.as_table()) {
      RETURN_IF_ERROR(Flatten(path, *inner, absl::StrCat(key, "."), values));
      continue;
    }
    std::vector<std::string> texts;
    if (const auto* items = node.as_array()) {
      for (const toml::node& item : *items) {
        const auto text = ScalarText(item);
        if (!text) return Refuse(path, item, key);
        texts.push_back(*text);
      }
    } else {
      const auto text = ScalarText(node);
      if (!text) return Refuse(path, node, key);
      texts.push_back(*text);
    }
    values->emplace_back(key, std::move(texts));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Values> ReadTomlFile(const std::string& path) {
  const toml::parse_result parsed = toml::parse_file(path);
  if (parsed.failed()) {
    const toml::parse_error& error = parsed.error();
    const std::string place =
        error.source().begin.line > 0 ? absl::StrCat(":", error.source().begin.line) : "";
    return absl::InvalidArgumentError(
        absl::StrCat(path, place, ": ", std::string(error.description())));
  }
  Values values;
  RETURN_IF_ERROR(Flatten(path, parsed.table(), "", &values));
  return values;
}

}  // namespace nibble
