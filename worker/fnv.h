// A hash that is the same in every process, for comparing identities; not against malice.
#pragma once

#include <cstdint>
#include <string_view>

namespace nibble::worker {

// FNV-1a, 64 bits.
[[nodiscard]] constexpr uint64_t Fnv1a(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char byte : text) {
    hash ^= static_cast<unsigned char>(byte);
    hash *= 0x100000001b3;
  }
  return hash;
}

}  // namespace nibble::worker
