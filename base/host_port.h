// "host:port" as flags and configuration files give it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace nibble {

struct HostPort {
  std::string host;   // without the brackets of an IPv6 address
  uint16_t port = 0;  // 0 = any free port
};

// "127.0.0.1:9100", "[::1]:9100", "localhost:0". The host may not be empty: an address that
// listens everywhere is written out ("0.0.0.0:9100"). INVALID_ARGUMENT says what is allowed.
[[nodiscard]] absl::StatusOr<HostPort> ParseHostPort(std::string_view text);

// The reverse; brackets come back where the host holds a colon.
[[nodiscard]] std::string FormatHostPort(std::string_view host, uint16_t port);

// 127.0.0.0/8, ::1 and localhost: what is sent there leaves no machine. Names are not looked up.
[[nodiscard]] bool IsLoopbackHost(const std::string& host);

}  // namespace nibble
