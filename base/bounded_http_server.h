// cpp-httplib's server with what it lacks: it collects a request's lines without a bound of their
// length or number, and waits for each byte anew.
#pragma once

#include <httplib.h>

#include <chrono>
#include <cstddef>

#include "base/clock.h"

namespace nibble {

// One request a connection. Past `request_bytes` (line, fields and body together) a connection is
// answered 431 and closed, whatever else is on its way; one whose request is not there in whole
// after `stall`, that takes no byte of its answer for as long, or not the whole of it within five
// times that, is closed.
class BoundedHttpServer final : public httplib::Server {
 public:
  BoundedHttpServer(size_t request_bytes, Duration stall)
      : request_bytes_(request_bytes), stall_(stall) {}

 private:
  bool process_and_close_socket(socket_t socket) override;

  const size_t request_bytes_;
  const Duration stall_;
};

}  // namespace nibble
