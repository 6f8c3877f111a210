#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "worker/collectives/store.h"
#include "worker/collectives/store_protocol.h"

namespace nibble::collectives {
namespace {

constexpr Duration kRetry = std::chrono::milliseconds(50);

Duration Left(Deadline deadline) { return deadline - std::chrono::steady_clock::now(); }

// DEADLINE_EXCEEDED when `fd` is not ready for `events` by then.
absl::Status WaitFor(int fd, short events, Deadline deadline) {
  for (;;) {
    const Duration left = Left(deadline);
    if (left <= Duration::zero()) {
      return absl::DeadlineExceededError("the group's store did not answer in time");
    }
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(
        std::min<Duration>(left, std::chrono::hours(1)));
    pollfd polled{.fd = fd, .events = events, .revents = 0};
    if (poll(&polled, 1, static_cast<int>(ms.count()) + 1) > 0) return absl::OkStatus();
  }
}

absl::Status Lost() { return absl::UnavailableError("the connection to the group's store ended"); }

absl::Status SendAll(int fd, const char* bytes, size_t count, Deadline deadline) {
  while (count > 0) {
    const ssize_t sent = send(fd, bytes, count, MSG_NOSIGNAL);
    if (sent > 0) {
      bytes += sent;
      count -= static_cast<size_t>(sent);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      RETURN_IF_ERROR(WaitFor(fd, POLLOUT, deadline));
    } else if (errno != EINTR) {
      return Lost();
    }
  }
  return absl::OkStatus();
}

absl::Status ReceiveAll(int fd, char* bytes, size_t count, Deadline deadline) {
  while (count > 0) {
    const ssize_t received = recv(fd, bytes, count, 0);
    if (received > 0) {
      bytes += received;
      count -= static_cast<size_t>(received);
    } else if (received < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      RETURN_IF_ERROR(WaitFor(fd, POLLIN, deadline));
    } else if (received == 0 || errno != EINTR) {
      return Lost();
    }
  }
  return absl::OkStatus();
}

// A connected non-blocking socket, or -1.
int TryConnect(const addrinfo& address, Deadline deadline) {
  const int fd = socket(address.ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  bool connected = connect(fd, address.ai_addr, address.ai_addrlen) == 0;
  if (!connected && errno == EINPROGRESS && WaitFor(fd, POLLOUT, deadline).ok()) {
    int error = 0;
    socklen_t bytes = sizeof(error);
    connected = getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &bytes) == 0 && error == 0;
  }
  if (connected) {
    const int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
    return fd;
  }
  close(fd);
  return -1;
}

int TryConnect(const std::string& host, uint16_t port, Deadline deadline) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (getaddrinfo(host.c_str(), absl::StrCat(port).c_str(), &hints, &found) != 0) return -1;
  int fd = -1;
  for (const addrinfo* at = found; at != nullptr && fd < 0; at = at->ai_next) {
    fd = TryConnect(*at, deadline);
  }
  freeaddrinfo(found);
  return fd;
}

}  // namespace

absl::StatusOr<std::unique_ptr<StoreClient>> StoreClient::Connect(const std::string& host,
                                                                  uint16_t port, uint64_t group_key,
                                                                  Deadline deadline) {
  int fd = TryConnect(host, port, deadline);
  while (fd < 0 && Left(deadline) > kRetry) {
    std::this_thread::sleep_for(kRetry);
    fd = TryConnect(host, port, deadline);
  }
  if (fd < 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot reach the group's store on port ", port, " in time"));
  }
  std::unique_ptr<StoreClient> client(new StoreClient(fd));
  const StoreHello hello{.group_key = group_key};
  RETURN_IF_ERROR(SendAll(fd, reinterpret_cast<const char*>(&hello), sizeof(hello), deadline));
  return client;
}

StoreClient::~StoreClient() { close(fd_); }

absl::Status StoreClient::Set(const std::string& key, const std::string& value, Deadline deadline) {
  if (key.size() > kStoreKeyMax || value.size() > kStoreValueMax) {
    return absl::InvalidArgumentError(absl::StrCat("a store entry of ", key.size(), " + ",
                                                   value.size(), " bytes; limit is ", kStoreKeyMax,
                                                   " + ", kStoreValueMax));
  }
  const StoreRequestHeader header{.operation = StoreOperation::kSet,
                                  .key_bytes = static_cast<uint32_t>(key.size()),
                                  .value_bytes = static_cast<uint32_t>(value.size())};
  std::string request(reinterpret_cast<const char*>(&header), sizeof(header));
  request += key;
  request += value;
  RETURN_IF_ERROR(SendAll(fd_, request.data(), request.size(), deadline));
  uint32_t length = 0;
  return ReceiveAll(fd_, reinterpret_cast<char*>(&length), sizeof(length), deadline);
}

absl::StatusOr<std::string> StoreClient::Get(const std::string& key, Deadline deadline) {
  if (key.size() > kStoreKeyMax) {
    return absl::InvalidArgumentError("a store key that is too long");
  }
  const StoreRequestHeader header{.operation = StoreOperation::kGet,
                                  .key_bytes = static_cast<uint32_t>(key.size())};
  std::string request(reinterpret_cast<const char*>(&header), sizeof(header));
  request += key;
  RETURN_IF_ERROR(SendAll(fd_, request.data(), request.size(), deadline));
  uint32_t length = 0;
  RETURN_IF_ERROR(ReceiveAll(fd_, reinterpret_cast<char*>(&length), sizeof(length), deadline));
  if (length > kStoreValueMax) return Lost();
  std::string value(length, '\0');
  RETURN_IF_ERROR(ReceiveAll(fd_, value.data(), value.size(), deadline));
  return value;
}

}  // namespace nibble::collectives
