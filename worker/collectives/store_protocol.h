// The bytes between StoreClient and StoreServer; little-endian, as both ends are x86.
//
//   client, once:  Hello
//   client:        RequestHeader, key bytes, value bytes (kSet only)
//   server:        uint32 length, value bytes (none for kSet); a kGet is answered when the key is
//   set
#pragma once

#include <cstddef>
#include <cstdint>

namespace nibble::collectives {

inline constexpr uint64_t kStoreMagic = 0x31726f747362696e;  // "nibstor1"
inline constexpr uint32_t kStoreKeyMax = 256;
inline constexpr uint32_t kStoreValueMax = 1 << 20;
inline constexpr size_t kStoreKeysMax = 4096;

struct StoreHello {
  uint64_t magic = kStoreMagic;
  uint64_t group_key = 0;
};

enum class StoreOperation : uint32_t { kSet = 1, kGet = 2 };

struct StoreRequestHeader {
  StoreOperation operation = StoreOperation::kGet;
  uint32_t key_bytes = 0;
  uint32_t value_bytes = 0;
};

}  // namespace nibble::collectives
