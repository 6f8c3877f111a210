// Error messages from parts, where abseil's own string_view is not the standard one.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>

#include "absl/strings/str_cat.h"

namespace nibble::model {

template <typename Part>
[[nodiscard]] decltype(auto) MessagePart(const Part& part) {
  if constexpr (std::is_same_v<Part, std::string_view>) {
    return absl::string_view(part.data(), part.size());
  } else {
    return (part);
  }
}

// Message("rank ", 3, " of ", name): as absl::StrCat, and takes std::string_view too.
template <typename... Parts>
[[nodiscard]] std::string Message(const Parts&... parts) {
  return absl::StrCat(MessagePart(parts)...);
}

}  // namespace nibble::model
