// nibble-gateway: text in, text out, in front of worker groups.
#include <grpc/support/log.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "base/announce.h"
#include "base/config.h"
#include "base/exit_codes.h"
#include "base/last_words.h"
#include "base/logging.h"
#include "base/version.h"
#include "services/gateway/options.h"
#include "services/gateway/server.h"

namespace nibble::gateway {
namespace {

constexpr auto kLastWords = std::chrono::milliseconds(1800);  // after a second signal

sigset_t StopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

// gRPC's own lines go where ours go; what matters of them comes as statuses as well.
void LogGrpc(gpr_log_func_args* line) { spdlog::debug("grpc: {}", line->message); }

// True when a signal came within the time.
bool WaitForSignal(std::chrono::milliseconds limit) {
  const sigset_t signals = StopSignals();
  const timespec time = {limit.count() / 1000, limit.count() % 1000 * 1'000'000};
  return ::sigtimedwait(&signals, nullptr, &time) > 0;
}

int Fail(const ProgramOptions& options, const absl::Status& status) {
  std::fprintf(stderr, "nibble-gateway: %s\n", std::string(status.message()).c_str());
  WriteLastWords(options.termination_log, kExitConfiguration, std::string(status.message()));
  return kExitConfiguration;
}

absl::Status Announce(const std::string& path, const GatewayServer& server) {
  std::vector<std::pair<std::string, std::string>> entries = {{"grpc", server.address()}};
  if (const std::string address = server.metrics_address(); !address.empty()) {
    entries.emplace_back("metrics", address);
  }
  if (!server.admin_address().empty()) entries.emplace_back("admin", server.admin_address());
  return WriteAnnouncement(path, entries);
}

// Drains; a second signal ends it at once. The exit code.
int Drain(std::unique_ptr<GatewayServer> server, Duration timeout) {
  std::atomic<bool> hurry{false};
  std::atomic<bool> done{false};
  size_t cut = 0;  // written before `done`
  std::thread drainer([&] {
    cut = server->Shutdown(timeout, [&] { return hurry.load(); });
    spdlog::info("drained, {} calls cut short", cut);
    server.reset();
    done.store(true);
  });
  while (!done.load() && !hurry.load()) {
    if (WaitForSignal(std::chrono::milliseconds(20))) hurry.store(true);
  }
  const auto until = std::chrono::steady_clock::now() + kLastWords;
  while (!done.load() && std::chrono::steady_clock::now() < until) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  if (!done.load()) std::_Exit(kExitFailure);  // whoever sends a second signal wants it gone
  drainer.join();
  return hurry.load() && cut > 0 ? kExitFailure : kExitDrained;
}

int Main(int argc, char** argv) {
  const sigset_t signals = StopSignals();
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // before any thread
  // Abseil as packaged looks for cycles of locks at every one that is taken under another.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  std::signal(SIGPIPE, SIG_IGN);

  ProgramOptions options;
  ConfigParser parser({.name = "nibble-gateway",
                       .summary = "Serves text generation to clients, from worker groups.",
                       .example = "nibble-gateway --groups 127.0.0.1:50052"});
  DeclareOptions(&parser, &options);
  if (const auto exit_code = parser.ParseMain(argc, argv)) return *exit_code;
  if (const absl::Status status = CompleteOptions(&options); !status.ok()) {
    return Fail(options, status);
  }
  if (const absl::Status status = InitLogging(
          {.level = options.log_level, .format = options.log_format, .process = "gateway"});
      !status.ok()) {
    return Fail(options, status);
  }
  gpr_set_log_function(LogGrpc);
  auto server = GatewayServer::Start(options.gateway);
  if (!server.ok()) return Fail(options, server.status());
  spdlog::info("{}", VersionLine("nibble-gateway"));
  spdlog::info("serves clients at {}, metrics at {}, {} worker groups", (*server)->address(),
               (*server)->metrics_address(), options.gateway.groups.size());
  if (!options.announce.empty()) {
    if (const absl::Status status = Announce(options.announce, **server); !status.ok()) {
      return Fail(options, status);
    }
  }
  while (!WaitForSignal(std::chrono::hours(1))) {
  }
  return Drain(*std::move(server), options.drain_timeout);
}

}  // namespace
}  // namespace nibble::gateway

int main(int argc, char** argv) { return nibble::gateway::Main(argc, argv); }
