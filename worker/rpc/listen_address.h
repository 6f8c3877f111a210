// Where the leader listens: a TCP address or a unix socket.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace nibble::rpc {

struct ListenAddress {
  std::string unix_path = {};  // empty = TCP
  std::string host = {};
  uint16_t port = 0;  // 0 = any free one

  // As gRPC and clients write it: "host:port" or "unix:path".
  [[nodiscard]] std::string ToString() const;
};

// "host:port" or "unix:PATH". INVALID_ARGUMENT says what is allowed.
[[nodiscard]] absl::StatusOr<ListenAddress> ParseListenAddress(std::string_view text);

// Tries whether the address could be listened on now, without listening: INVALID_ARGUMENT names
// the address and why not. A unix socket that nobody answers on is left over and counts as free.
[[nodiscard]] absl::Status CheckAvailable(const ListenAddress& address);

}  // namespace nibble::rpc
