// A small key-value store over TCP by which the ranks of a group find each other. It runs beside
// rank 0 and is needed only while the ranks connect.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"

namespace nibble::collectives {

// Serves on one thread of its own. Connections that do not begin with the group's key are closed;
// keys, values and connections are bounded, so a stranger on the port cannot harm the group.
class StoreServer {
 public:
  struct Options {
    std::string address = "127.0.0.1";
    uint16_t port = 0;  // 0 = any free one
    uint64_t group_key = 0;
    int32_t connections_max = 256;
  };
  // UNAVAILABLE when the address cannot be bound.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<StoreServer>> Listen(const Options& options);
  ~StoreServer();
  StoreServer(const StoreServer&) = delete;
  StoreServer& operator=(const StoreServer&) = delete;

  [[nodiscard]] uint16_t port() const;

 private:
  struct State;
  explicit StoreServer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// One connection to the server. Not thread-safe.
class StoreClient {
 public:
  // Tries until `deadline`: the server may start later than its clients.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<StoreClient>> Connect(const std::string& host,
                                                                            uint16_t port,
                                                                            uint64_t group_key,
                                                                            Deadline deadline);
  ~StoreClient();
  StoreClient(const StoreClient&) = delete;
  StoreClient& operator=(const StoreClient&) = delete;

  [[nodiscard]] absl::Status Set(const std::string& key, const std::string& value,
                                 Deadline deadline);
  // Waits for the key. DEADLINE_EXCEEDED when nobody has set it by then.
  [[nodiscard]] absl::StatusOr<std::string> Get(const std::string& key, Deadline deadline);

 private:
  explicit StoreClient(int fd) : fd_(fd) {}
  const int fd_;
};

}  // namespace nibble::collectives
