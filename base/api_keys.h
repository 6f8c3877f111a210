// API keys as they are kept: a file of SHA-256 sums with what each key may do.
//
//   [keys]
//   alice-1 = { sha256 = "…", tenant = "alice", priority = "normal", max_requests = 8 }
//
//   [tenants]
//   alice = { tokens_per_minute = 60000, max_requests = 16 }
//
// A key is 32 random bytes, so a plain hash keeps it: there is nothing to guess.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "base/priority.h"

namespace nibble {

using Sha256 = std::array<unsigned char, 32>;

[[nodiscard]] const char* PriorityWord(Priority priority);

struct ApiKey {
  std::string id;  // the operator's name for it, in logs
  Sha256 hash{};
  std::string tenant;
  Priority priority = Priority::kNormal;
  int64_t max_requests = 0;         // in flight; 0 = no limit of its own
  std::vector<std::string> models;  // it may use; empty = all
  bool admin = false;               // may use the admin service
};

struct Tenant {
  std::string name;
  int64_t max_requests = 0;       // in flight, all of its keys together; 0 = none
  int64_t tokens_per_minute = 0;  // prompt and generated; 0 = no quota
};

// In the order of their names. Every tenant of a key is there.
struct ApiKeyFile {
  std::vector<ApiKey> keys;
  std::vector<Tenant> tenants;
};

// INVALID_ARGUMENT names file, entry and what is allowed, never a hash.
[[nodiscard]] absl::StatusOr<ApiKeyFile> ReadApiKeys(const std::string& path);

[[nodiscard]] Sha256 HashOf(std::string_view text);
[[nodiscard]] std::string HexOf(const Sha256& hash);
// Takes the same time wherever the two differ.
[[nodiscard]] bool Equal(const Sha256& a, const Sha256& b);

// A fresh key: "nbl_" and 43 letters, digits, '-' or '_'.
[[nodiscard]] std::string NewApiKey();

// The line of the table [keys] that ReadApiKeys reads back.
[[nodiscard]] std::string FormatApiKey(const ApiKey& key);

// Names of keys and tenants: 1 to 64 of a-z, A-Z, 0-9, '-', '_'.
[[nodiscard]] bool IsKeyName(std::string_view name);

}  // namespace nibble
