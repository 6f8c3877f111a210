// CRC-32C (Castagnoli, as in RFC 3720): guards plan records against torn or stray writes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace nibble::step {

// The checksum of `bytes` appended to something whose checksum is `crc` (0 for nothing).
// Uses the processor's instruction where there is one.
[[nodiscard]] uint32_t Crc32c(std::span<const std::byte> bytes, uint32_t crc = 0);

// The same by table alone, on every machine.
[[nodiscard]] uint32_t Crc32cPortable(std::span<const std::byte> bytes, uint32_t crc = 0);

}  // namespace nibble::step
