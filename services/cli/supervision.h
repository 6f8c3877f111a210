// Keeps a gateway and a worker group running on this machine, and ends them in order.
#pragma once

#include <csignal>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "services/cli/child_process.h"
#include "services/cli/restart_backoff.h"
#include "services/cli/serve_options.h"

namespace nibble::cli {

// One thread, the one that calls Run(): SIGTERM and SIGINT are blocked in it and read from a
// descriptor.
class Supervision {
 public:
  Supervision(ServeOptions options, ServePaths paths);
  ~Supervision();
  Supervision(const Supervision&) = delete;
  Supervision& operator=(const Supervision&) = delete;

  // Starts the group, then the gateway; says where they listen; starts again what ends; returns
  // the exit code once told to end, or when the first start fails.
  [[nodiscard]] int Run();

 private:
  // A program that is kept running.
  struct Service {
    std::string name;  // "worker group"
    std::vector<std::string> command;
    std::string announce;
    std::unique_ptr<ChildProcess> process = nullptr;  // null between an end and the next start
    bool ready = false;  // it has announced its addresses since its start
    Deadline started = {};
    Deadline start_at = Deadline::max();  // the next start, where one is due
    RestartBackoff backoff = {};
    std::vector<std::pair<std::string, std::string>> addresses = {};  // as announced
  };

  // Starts it and waits until it is ready; the exit code when that does not happen.
  [[nodiscard]] std::optional<int> StartFirst(Service* service);
  [[nodiscard]] bool Start(Service* service);
  // Reads the announcement where there is one; keeps the ports for the next start.
  void LookForAnnouncement(Service* service);
  // Notes an end, and when to start again.
  void Watch(Service* service);
  void StartWhereDue(Service* service);
  // Blocks until a process ends, a signal comes, or `until`; the signal, or 0.
  [[nodiscard]] int Await(Deadline until);
  // Asks it to end, waits, kills it; whether it ended by itself with success.
  [[nodiscard]] bool End(Service* service, Duration patience);
  [[nodiscard]] int ShutDown();
  void SayReady() const;

  ServeOptions options_;
  ServePaths paths_;
  SteadyClock clock_;
  sigset_t signals_before_{};
  int signal_descriptor_ = -1;
  Service worker_;
  Service gateway_;
};

}  // namespace nibble::cli
