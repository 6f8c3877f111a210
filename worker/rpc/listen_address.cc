#include "worker/rpc/listen_address.h"

#include <netdb.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/host_port.h"
#include "base/status.h"

namespace nibble::rpc {
namespace {

constexpr std::string_view kUnixPrefix = "unix:";

absl::Status Unavailable(const ListenAddress& address, std::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("listen address ", address.ToString(), ": ",
                                                 absl::string_view(why.data(), why.size())));
}

class Socket {
 public:
  explicit Socket(int family) : fd_(::socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0)) {}
  ~Socket() {
    if (fd_ >= 0) ::close(fd_);
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  [[nodiscard]] int fd() const { return fd_; }

 private:
  const int fd_;
};

absl::Status CheckUnix(const ListenAddress& address) {
  struct stat info {};
  if (::lstat(address.unix_path.c_str(), &info) != 0) {
    const size_t slash = address.unix_path.rfind('/');
    const std::string folder =
        slash == std::string::npos ? "." : address.unix_path.substr(0, slash + 1);
    if (::access(folder.c_str(), W_OK | X_OK) == 0) return absl::OkStatus();
    return Unavailable(address, std::strerror(errno));
  }
  if (!S_ISSOCK(info.st_mode)) return Unavailable(address, "is a file, and no socket");
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::memcpy(name.sun_path, address.unix_path.data(), address.unix_path.size());
  const Socket socket(AF_UNIX);
  if (::connect(socket.fd(), reinterpret_cast<const sockaddr*>(&name), sizeof(name)) == 0) {
    return Unavailable(address, "is in use");
  }
  return absl::OkStatus();
}

absl::Status CheckTcp(const ListenAddress& address) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error =
      ::getaddrinfo(address.host.c_str(), absl::StrCat(address.port).c_str(), &hints, &found);
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> list(found, &::freeaddrinfo);
  if (error != 0) return Unavailable(address, ::gai_strerror(error));
  for (const addrinfo* one = list.get(); one != nullptr; one = one->ai_next) {
    const Socket socket(one->ai_family);
    if (socket.fd() < 0) continue;  // an address family that this machine does not have
    const int yes = 1;
    ::setsockopt(socket.fd(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    if (::bind(socket.fd(), one->ai_addr, one->ai_addrlen) != 0) {
      return Unavailable(address, std::strerror(errno));
    }
  }
  return absl::OkStatus();
}

}  // namespace

std::string ListenAddress::ToString() const {
  return unix_path.empty() ? FormatHostPort(host, port) : absl::StrCat("unix:", unix_path);
}

absl::StatusOr<ListenAddress> ParseListenAddress(std::string_view text) {
  ListenAddress address;
  if (text.substr(0, kUnixPrefix.size()) == kUnixPrefix) {
    address.unix_path = std::string(text.substr(kUnixPrefix.size()));
    constexpr size_t kPathMax = sizeof(sockaddr_un::sun_path) - 1;
    if (address.unix_path.empty() || address.unix_path.size() > kPathMax) {
      return absl::InvalidArgumentError(absl::StrCat("the path of a unix socket has ",
                                                     address.unix_path.size(),
                                                     " bytes; allowed: 1 to ", kPathMax));
    }
    return address;
  }
  ASSIGN_OR_RETURN(HostPort where, ParseHostPort(text));
  address.host = std::move(where.host);
  address.port = where.port;
  return address;
}

absl::Status CheckAvailable(const ListenAddress& address) {
  return address.unix_path.empty() ? CheckTcp(address) : CheckUnix(address);
}

}  // namespace nibble::rpc
