// A TCP connection that sends any bytes, to see what a server makes of them.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

namespace nibble::testing {

struct RawExchange {
  size_t sent = 0;                             // until the server closed the connection
  std::string got;                             // what could be read of its answer
  bool closed = false;                         // by the server, within ten seconds of the last byte
  std::chrono::steady_clock::duration took{};  // from the first byte to the end
};

// Sends `begin` to host:port and then `again` over and over, until `bytes` have gone or the
// server closes the connection; reads beside that, and then until the end.
[[nodiscard]] RawExchange SendRaw(const std::string& address, const std::string& begin,
                                  const std::string& again, size_t bytes);

// Sends host:port `byte` every so often and nothing else, until the server closes the connection.
[[nodiscard]] RawExchange Drip(const std::string& address, const std::string& byte,
                               std::chrono::milliseconds every);

// A frame of HTTP/2 (RFC 9113, 4.1), by hand: clients' libraries have bounds of their own.
[[nodiscard]] std::string Http2Frame(uint8_t type, uint8_t flags, uint8_t stream,
                                     const std::string& payload);

}  // namespace nibble::testing
