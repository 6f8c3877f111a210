// Names that come from a file, made fit for an error message.
#pragma once

#include <string>
#include <string_view>

#include "absl/strings/escaping.h"

namespace nibble::weights {

// Quoted, control characters escaped, cut at 160 bytes.
[[nodiscard]] inline std::string Printable(std::string_view name) {
  constexpr size_t kLongest = 160;
  std::string text = absl::CHexEscape(absl::string_view(name.data(), name.size()));
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  return "\"" + text + "\"";
}

}  // namespace nibble::weights
