#include "tests/support/raw_client.h"

#include <arpa/inet.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>

#include "base/host_port.h"
#include "base/owned_fd.h"

namespace nibble::testing {
namespace {

constexpr int kLastWaitMs = 10'000;

OwnedFd Connect(const std::string& address) {
  const auto where = ParseHostPort(address);
  OwnedFd connection(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in target{};
  target.sin_family = AF_INET;
  target.sin_port = htons(where->port);
  ::inet_pton(AF_INET, where->host.c_str(), &target.sin_addr);
  if (::connect(connection.get(), reinterpret_cast<sockaddr*>(&target), sizeof(target)) != 0) {
    connection.Close();
  }
  return connection;
}

// False at the end of the connection.
bool ReadSome(int connection, std::string* got) {
  std::array<char, 4096> buffer;
  const ssize_t count = ::recv(connection, buffer.data(), buffer.size(), MSG_DONTWAIT);
  if (count > 0) got->append(buffer.data(), static_cast<size_t>(count));
  return count > 0;
}

}  // namespace

RawExchange SendRaw(const std::string& address, const std::string& begin, const std::string& again,
                    size_t bytes) {
  RawExchange exchange;
  const OwnedFd connection = Connect(address);
  const auto from = std::chrono::steady_clock::now();
  std::string waiting = begin;
  for (;;) {
    if (waiting.empty() && exchange.sent < bytes) waiting = again;
    const short events = waiting.empty() ? POLLIN : POLLIN | POLLOUT;
    pollfd entry = {.fd = connection.get(), .events = events, .revents = 0};
    if (::poll(&entry, 1, kLastWaitMs) <= 0) break;
    if ((entry.revents & (POLLIN | POLLERR | POLLHUP)) != 0 &&
        !ReadSome(connection.get(), &exchange.got)) {
      exchange.closed = true;
      break;
    }
    if ((entry.revents & POLLOUT) == 0) continue;
    const ssize_t count =
        ::send(connection.get(), waiting.data(), waiting.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count < 0) continue;  // what the poll says next
    exchange.sent += static_cast<size_t>(count);
    waiting.erase(0, static_cast<size_t>(count));
  }
  exchange.took = std::chrono::steady_clock::now() - from;
  return exchange;
}

RawExchange Drip(const std::string& address, const std::string& byte,
                 std::chrono::milliseconds every) {
  RawExchange exchange;
  const OwnedFd connection = Connect(address);
  const auto from = std::chrono::steady_clock::now();
  while (exchange.took < std::chrono::milliseconds(kLastWaitMs)) {
    const ssize_t count = ::send(connection.get(), byte.data(), byte.size(), MSG_NOSIGNAL);
    if (count > 0) exchange.sent += static_cast<size_t>(count);
    pollfd entry = {.fd = connection.get(), .events = POLLIN, .revents = 0};
    const bool readable = ::poll(&entry, 1, static_cast<int>(every.count())) > 0;
    exchange.took = std::chrono::steady_clock::now() - from;
    if (readable && !ReadSome(connection.get(), &exchange.got)) {
      exchange.closed = true;
      break;
    }
  }
  return exchange;
}

std::string Http2Frame(uint8_t type, uint8_t flags, uint8_t stream, const std::string& payload) {
  const size_t size = payload.size();
  std::string frame;
  for (const size_t byte : {size >> 16, size >> 8, size, size_t{type}, size_t{flags}, size_t{0},
                            size_t{0}, size_t{0}, size_t{stream}}) {
    frame.push_back(static_cast<char>(byte));
  }
  return frame + payload;
}

}  // namespace nibble::testing
