// Collectives among CPU ranks on several machines, over Gloo's TCP transport.
//
// Gloo carries bytes only: every rank gathers the others' partial sums and adds them itself in
// rank order, so the result has the same bits as through shared memory.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/collectives/communicator.h"

namespace nibble::collectives {

struct GlooOptions {
  int32_t rank = 0;
  int32_t size = 1;
  // Address (name or number) that this rank's connections are bound to. Where it is empty, the
  // address of `interface`; where that is empty too, loopback.
  std::string bind_address = {};
  std::string interface = {};
  // Where the group's StoreServer listens (store.h), and the group's key.
  std::string store_host = {};
  uint16_t store_port = 0;
  uint64_t group_key = 0;
  Duration connect_timeout = std::chrono::seconds(60);  // until every rank has come
  Duration timeout = std::chrono::seconds(10);          // of one wait for peers
};

// Blocks until all ranks are connected. UNAVAILABLE or DEADLINE_EXCEEDED when they are not in
// time. A peer that dies later makes the pending call fail with ABORTED, one that hangs with
// DEADLINE_EXCEEDED. Gloo writes to sockets that a peer may have closed, so SIGPIPE is ignored from
// here on where it still had its deadly default.
[[nodiscard]] absl::StatusOr<std::unique_ptr<Communicator>> MakeGlooCommunicator(
    const GlooOptions& options);

}  // namespace nibble::collectives
