#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <map>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "worker/collectives/store.h"
#include "worker/collectives/store_protocol.h"

namespace nibble::collectives {
namespace {

struct Connection {
  int fd = -1;
  bool greeted = false;
  bool broken = false;
  std::string in;           // bytes of a request that is not complete yet
  std::string out;          // bytes not taken by the socket yet
  std::string waiting_for;  // key of the kGet that is not answered yet

  // A client sends its next request after the answer to the one before, so these stay small.
  [[nodiscard]] bool TooLong() const {
    return in.size() >
           sizeof(StoreHello) + sizeof(StoreRequestHeader) + kStoreKeyMax + kStoreValueMax;
  }
};

}  // namespace

struct StoreServer::State {
  Options options;
  int listen_fd = -1;
  int stop_fd = -1;
  uint16_t port = 0;
  std::vector<Connection> connections;
  std::map<std::string, std::string> values;
  std::thread thread;

  ~State() {
    for (const Connection& connection : connections) close(connection.fd);
    if (listen_fd >= 0) close(listen_fd);
    if (stop_fd >= 0) close(stop_fd);
  }

  void Run();
  void Accept();
  void Read(Connection& connection);
  bool TakeHello(Connection& connection);
  bool TakeRequest(Connection& connection);
  void Answer(Connection& connection, const std::string& value);
  void Set(const std::string& key, std::string value);
  static void Write(Connection& connection);
};

void StoreServer::State::Run() {
  std::vector<pollfd> polled;
  for (;;) {
    polled.clear();
    polled.push_back({.fd = stop_fd, .events = POLLIN, .revents = 0});
    polled.push_back({.fd = listen_fd, .events = POLLIN, .revents = 0});
    for (const Connection& connection : connections) {
      const auto events = static_cast<short>(connection.out.empty() ? POLLIN : POLLIN | POLLOUT);
      polled.push_back({.fd = connection.fd, .events = events, .revents = 0});
    }
    if (poll(polled.data(), polled.size(), -1) < 0 && errno != EINTR) return;
    if (polled[0].revents != 0) return;
    for (size_t i = 0; i < connections.size(); ++i) {
      const short events = polled[i + 2].revents;
      if ((events & POLLOUT) != 0) Write(connections[i]);
      if ((events & (POLLIN | POLLHUP | POLLERR)) != 0) Read(connections[i]);
    }
    std::erase_if(connections, [](const Connection& connection) {
      if (connection.broken) close(connection.fd);
      return connection.broken;
    });
    if ((polled[1].revents & POLLIN) != 0) Accept();
  }
}

void StoreServer::State::Accept() {
  const int fd = accept4(listen_fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd < 0) return;
  if (connections.size() >= static_cast<size_t>(options.connections_max)) {
    // Strangers that never greet give way to those who may be ranks.
    const auto idle = std::find_if(connections.begin(), connections.end(),
                                   [](const Connection& c) { return !c.greeted; });
    if (idle == connections.end()) {
      close(fd);
      return;
    }
    close(idle->fd);
    connections.erase(idle);
  }
  connections.emplace_back().fd = fd;
}

void StoreServer::State::Read(Connection& connection) {
  std::array<char, 16384> bytes;
  for (;;) {
    const ssize_t count = recv(connection.fd, bytes.data(), bytes.size(), 0);
    if (count > 0) {
      connection.in.append(bytes.data(), static_cast<size_t>(count));
      connection.broken = connection.TooLong();
      if (!connection.broken) continue;
    } else if (count < 0 && errno == EINTR) {
      continue;
    } else if (count == 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) {
      connection.broken = true;
    }
    break;
  }
  while (!connection.broken &&
         (connection.greeted ? TakeRequest(connection) : TakeHello(connection))) {
  }
}

// True when a whole message was taken from connection.in.
bool StoreServer::State::TakeHello(Connection& connection) {
  StoreHello hello;
  if (connection.in.size() < sizeof(hello)) return false;
  std::memcpy(&hello, connection.in.data(), sizeof(hello));
  if (hello.magic != kStoreMagic || hello.group_key != options.group_key) {
    connection.broken = true;
    return false;
  }
  connection.in.erase(0, sizeof(hello));
  connection.greeted = true;
  return true;
}

bool StoreServer::State::TakeRequest(Connection& connection) {
  StoreRequestHeader header;
  if (connection.in.size() < sizeof(header)) return false;
  std::memcpy(&header, connection.in.data(), sizeof(header));
  const bool set = header.operation == StoreOperation::kSet;
  if ((!set && header.operation != StoreOperation::kGet) || header.key_bytes > kStoreKeyMax ||
      header.value_bytes > kStoreValueMax || !connection.waiting_for.empty()) {
    connection.broken = true;
    return false;
  }
  const size_t bytes = sizeof(header) + header.key_bytes + header.value_bytes;
  if (connection.in.size() < bytes) return false;
  const std::string key = connection.in.substr(sizeof(header), header.key_bytes);
  std::string value = connection.in.substr(sizeof(header) + header.key_bytes, header.value_bytes);
  connection.in.erase(0, bytes);
  if (set) {
    if (values.size() >= kStoreKeysMax && values.count(key) == 0) {
      connection.broken = true;
      return false;
    }
    Answer(connection, "");
    Set(key, std::move(value));
  } else if (const auto found = values.find(key); found != values.end()) {
    Answer(connection, found->second);
  } else {
    connection.waiting_for = key;
  }
  return true;
}

void StoreServer::State::Set(const std::string& key, std::string value) {
  const std::string& stored = values[key] = std::move(value);
  for (Connection& connection : connections) {
    if (!connection.broken && connection.waiting_for == key) {
      connection.waiting_for.clear();
      Answer(connection, stored);
    }
  }
}

void StoreServer::State::Answer(Connection& connection, const std::string& value) {
  const auto length = static_cast<uint32_t>(value.size());
  connection.out.append(reinterpret_cast<const char*>(&length), sizeof(length));
  connection.out.append(value);
  Write(connection);
}

void StoreServer::State::Write(Connection& connection) {
  while (!connection.out.empty()) {
    const ssize_t count =
        send(connection.fd, connection.out.data(), connection.out.size(), MSG_NOSIGNAL);
    if (count > 0) {
      connection.out.erase(0, static_cast<size_t>(count));
    } else if (errno != EINTR) {
      connection.broken = errno != EAGAIN && errno != EWOULDBLOCK;
      return;
    }
  }
}

StoreServer::StoreServer(std::unique_ptr<State> state) : state_(std::move(state)) {}

StoreServer::~StoreServer() {
  const uint64_t one = 1;
  // An eventfd takes this write always.
  [[maybe_unused]] const ssize_t written = write(state_->stop_fd, &one, sizeof(one));
  state_->thread.join();
}

uint16_t StoreServer::port() const { return state_->port; }

absl::StatusOr<std::unique_ptr<StoreServer>> StoreServer::Listen(const Options& options) {
  auto state = std::make_unique<State>();
  state->options = options;
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int resolved =
      getaddrinfo(options.address.c_str(), absl::StrCat(options.port).c_str(), &hints, &found);
  if (resolved != 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot resolve the address of the group's store: ", gai_strerror(resolved)));
  }
  state->listen_fd = socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  const int on = 1;
  setsockopt(state->listen_fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  const bool bound = state->listen_fd >= 0 &&
                     bind(state->listen_fd, found->ai_addr, found->ai_addrlen) == 0 &&
                     listen(state->listen_fd, 64) == 0;
  const int error = errno;
  freeaddrinfo(found);
  if (!bound) {
    return absl::UnavailableError(absl::StrCat("cannot listen for the ranks of the group on port ",
                                               options.port, ": ", strerror(error)));
  }
  sockaddr_storage name{};
  socklen_t name_bytes = sizeof(name);
  getsockname(state->listen_fd, reinterpret_cast<sockaddr*>(&name), &name_bytes);
  state->port =
      ntohs(name.ss_family == AF_INET6 ? reinterpret_cast<const sockaddr_in6*>(&name)->sin6_port
                                       : reinterpret_cast<const sockaddr_in*>(&name)->sin_port);
  state->stop_fd = eventfd(0, EFD_CLOEXEC);
  if (state->stop_fd < 0) return absl::ErrnoToStatus(errno, "the group's store (eventfd)");
  state->thread = std::thread([raw = state.get()] { raw->Run(); });
  return std::unique_ptr<StoreServer>(new StoreServer(std::move(state)));
}

}  // namespace nibble::collectives
