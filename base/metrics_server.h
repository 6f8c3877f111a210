// The plain HTTP port of a process: /metrics for Prometheus, /healthz and /readyz for probes, and /
// for people (base/status_page.h).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace prometheus {
class Collectable;
}

namespace nibble {

// Owns its threads: one that accepts and a few that answer. A connection carries one request, of at
// most 16 KiB, that must be there in two seconds, so a probe does not queue behind idle ones.
class MetricsServer {
 public:
  // Called on the server's threads, several at once: must not block, throw or take long.
  // OK is answered 200, anything else 503 with the message as body.
  using Probe = std::function<absl::Status()>;

  struct Options {
    std::string address;  // host:port; port 0 takes a free one
    // Collected in this order at every scrape. A family name may come from one of them only.
    std::vector<std::shared_ptr<const prometheus::Collectable>> collectables = {};
    bool vllm_names = false;  // vLLM's names beside our own (base/vllm_names.h)
    Probe live = nullptr;     // /healthz; null = always yes
    Probe ready = nullptr;    // /readyz; null = always yes
  };

  // Listens before it returns. INVALID_ARGUMENT: the address does not parse or cannot be bound
  // (the message names it).
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(Options options);

  // Stops accepting, finishes what is being answered.
  ~MetricsServer();
  MetricsServer(const MetricsServer&) = delete;
  MetricsServer& operator=(const MetricsServer&) = delete;

  // host:port as bound.
  [[nodiscard]] const std::string& address() const { return address_; }

 private:
  struct State;
  explicit MetricsServer(std::unique_ptr<State> state);

  std::unique_ptr<State> state_;
  std::string address_;
};

}  // namespace nibble
