// In which order requests get their turn: higher classes go first, always.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nibble {

enum class Priority : uint8_t { kLow, kNormal, kHigh };
inline constexpr size_t kPriorities = 3;

}  // namespace nibble
