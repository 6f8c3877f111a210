// Addresses as `nibble fetch` uses them: http and https, without a user's name in them.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace nibble::fetch {

struct Url {
  bool https = true;
  std::string host;  // lower case, without the brackets of an IPv6 address
  uint16_t port = 443;
  std::string target = "/";  // path and query, as they go over the wire

  [[nodiscard]] bool SameOrigin(const Url& other) const {
    return https == other.https && host == other.host && port == other.port;
  }
  // "https://host:port", the port only where it is not the scheme's own.
  [[nodiscard]] std::string Origin() const;
  // For people and logs: without the query, in which signed addresses carry their secret.
  [[nodiscard]] std::string Shown() const;
  // What is sent there leaves no machine (base/host_port.h).
  [[nodiscard]] bool IsLoopback() const;
};

// INVALID_ARGUMENT says what is allowed, without repeating a query or a password.
[[nodiscard]] absl::StatusOr<Url> ParseUrl(absl::string_view text);

// Where `location`, absolute or relative, leads from `base`.
[[nodiscard]] absl::StatusOr<Url> ResolveUrl(const Url& base, absl::string_view location);

// Percent-encodes everything but letters, digits and -._~ (and / where `keep_slash`).
[[nodiscard]] std::string EncodePath(absl::string_view text, bool keep_slash);

}  // namespace nibble::fetch
