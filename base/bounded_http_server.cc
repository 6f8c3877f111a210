#include "base/bounded_http_server.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

#include "base/owned_fd.h"

namespace nibble {
namespace {

constexpr std::string_view kTooLong =
    "HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: "
    "0\r\n\r\n";

// A reader that takes a little now and then holds a thread no longer than this.
constexpr int kAnswerStalls = 5;

class BoundedStream final : public httplib::Stream {
 public:
  BoundedStream(int socket, size_t bytes_max, Duration stall)
      : socket_(socket), left_(bytes_max), stall_(stall), until_(SteadyClock().Now() + stall) {}

  // A byte past the bound was asked for: nobody is answered but by kTooLong.
  [[nodiscard]] bool too_long() const { return too_long_; }
  void SayTooLong() { Send(kTooLong); }

  [[nodiscard]] bool is_readable() const override { return begin_ < end_ || Wait(POLLIN, Left()); }
  [[nodiscard]] bool is_writable() const override { return Wait(POLLOUT, stall_); }

  ssize_t read(char* bytes, size_t size) override {
    if (begin_ == end_ && !Fill()) return -1;
    const size_t count = std::min(size, end_ - begin_);
    std::memcpy(bytes, buffer_.data() + begin_, count);
    begin_ += count;
    return static_cast<ssize_t>(count);
  }

  ssize_t write(const char* bytes, size_t size) override {
    if (too_long_) return -1;
    return Send({bytes, size}) ? static_cast<ssize_t>(size) : -1;
  }

  // Nobody here asks who a client is.
  void get_remote_ip_and_port(std::string& ip, int& port) const override { ip.clear(), port = 0; }
  void get_local_ip_and_port(std::string& ip, int& port) const override { ip.clear(), port = 0; }
  [[nodiscard]] socket_t socket() const override { return socket_; }

 private:
  [[nodiscard]] Duration Left() const { return until_ - SteadyClock().Now(); }

  [[nodiscard]] bool Wait(short events, Duration at_most) const {
    const auto wait = std::chrono::ceil<std::chrono::milliseconds>(at_most).count();
    pollfd entry = {.fd = socket_, .events = events, .revents = 0};
    int count;
    do {
      count = ::poll(&entry, 1, static_cast<int>(std::max<int64_t>(0, wait)));
    } while (count < 0 && errno == EINTR);
    return count > 0;
  }

  // False at the connection's end, past the bound and past the time.
  bool Fill() {
    if (left_ == 0) {
      too_long_ = true;
      return false;
    }
    if (!Wait(POLLIN, Left())) return false;
    const ssize_t count = ::recv(socket_, buffer_.data(), std::min(buffer_.size(), left_), 0);
    if (count <= 0) return false;
    begin_ = 0;
    end_ = static_cast<size_t>(count);
    left_ -= end_;
    return true;
  }

  bool Send(std::string_view bytes) {
    if (!answer_until_) answer_until_ = SteadyClock().Now() + kAnswerStalls * stall_;
    while (!bytes.empty()) {
      const Duration left = *answer_until_ - SteadyClock().Now();
      if (!Wait(POLLOUT, std::min(stall_, left))) return false;
      const ssize_t count =
          ::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
      if (count < 0 && (errno == EINTR || errno == EAGAIN)) continue;
      if (count <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(count));
    }
    return true;
  }

  const int socket_;
  size_t left_;  // bytes that may still be received
  const Duration stall_;
  const Deadline until_;                  // of the whole request
  std::optional<Deadline> answer_until_;  // of the whole answer
  bool too_long_ = false;
  std::array<char, 4096> buffer_;
  size_t begin_ = 0;
  size_t end_ = 0;
};

}  // namespace

bool BoundedHttpServer::process_and_close_socket(socket_t socket) {
  const OwnedFd owned(socket);
  BoundedStream stream(socket, request_bytes_, stall_);
  bool closed = false;
  const bool answered = process_request(stream, /*close_connection=*/true, closed, nullptr);
  if (stream.too_long()) stream.SayTooLong();
  ::shutdown(socket, SHUT_RDWR);
  return answered;
}

}  // namespace nibble
