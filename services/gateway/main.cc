// nibble-gateway: text in, text out, in front of one or several worker groups.

#include <csignal>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/announce.h"
#include "base/config.h"
#include "base/exit_codes.h"
#include "base/logging.h"
#include "services/gateway/server.h"

namespace nibble::gateway {
namespace {

struct ProgramOptions {
  GatewayOptions gateway;
  std::string announce;
  int64_t prompt_bytes = 0;
  Duration drain_timeout = std::chrono::seconds(60);
  std::string log_level = "info";
  std::string log_format = "text";
};

void DeclareOptions(ConfigParser* parser, ProgramOptions* options) {
  using std::chrono::hours;
  using std::chrono::seconds;
  GatewayOptions& gateway = options->gateway;
  gateway.metrics_listen = "127.0.0.1:9100";
  options->prompt_bytes = static_cast<int64_t>(gateway.limits.prompt_bytes);
  parser->Group("Worker groups");
  parser->List("groups", &gateway.groups, "Leaders' addresses: host:port or unix:PATH").Required();
  parser->Choice<SamplingSource>(
      "sampling_defaults", &gateway.sampling,
      {{"model", SamplingSource::kModel}, {"nibble", SamplingSource::kNibble}},
      "Whose defaults fill unset sampling fields");
  parser->Group("Listening");
  parser->String("listen", &gateway.listen, "gRPC: host:port or unix:PATH");
  parser->String("metrics_listen", &gateway.metrics_listen,
                 "/metrics, /healthz and /readyz: host:port; empty: none");
  parser->String("admin_listen", &gateway.admin_listen, "Admin service; empty: none");
  parser->String("announce", &options->announce, "File that gets the addresses");
  parser->Group("Limits");
  parser->Int("max_concurrency", &gateway.limits.max_concurrency, {1, 1 << 20},
              "Calls in flight at once");
  parser->Bytes("max_prompt_bytes", &options->prompt_bytes, {1, int64_t{4} << 20},
                "Text of a prompt, or of a whole conversation");
  parser->Time("stall_timeout", &gateway.limits.stall_timeout, {seconds(1), hours(1)},
               "A reader that takes nothing for this long is cut off");
  parser->Time("drain_timeout", &options->drain_timeout, {Duration::zero(), hours(24)},
               "After SIGTERM, what runs may take this long");
  parser->Group("Logging");
  parser->Choice<std::string>("log.level", &options->log_level,
                              {{"trace", "trace"},
                               {"debug", "debug"},
                               {"info", "info"},
                               {"warn", "warn"},
                               {"error", "error"},
                               {"off", "off"}},
                              "Least important lines shown");
  parser->Choice<std::string>("log.format", &options->log_format,
                              {{"text", "text"}, {"json", "json"}}, "Form of the lines");
}

// SIGTERM and SIGINT, blocked in every thread and waited for in main's.
sigset_t EndingSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  return signals;
}

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "nibble-gateway: %s\n", std::string(status.message()).c_str());
  return kExitConfiguration;
}

absl::Status Announce(const std::string& path, const GatewayServer& server) {
  if (path.empty()) return absl::OkStatus();
  std::vector<std::pair<std::string, std::string>> entries = {{"grpc", server.address()}};
  if (!server.metrics_address().empty()) entries.emplace_back("metrics", server.metrics_address());
  if (!server.admin_address().empty()) entries.emplace_back("admin", server.admin_address());
  return WriteAnnouncement(path, entries);
}

int Main(int argc, char** argv) {
  const sigset_t signals = EndingSignals();
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);

  ProgramOptions options;
  ConfigParser parser({.name = "nibble-gateway",
                       .summary = "Serves text over gRPC in front of worker groups.",
                       .example = "nibble-gateway --groups 127.0.0.1:50052"});
  DeclareOptions(&parser, &options);
  if (const auto exit_code = parser.ParseMain(argc, argv)) return *exit_code;
  options.gateway.limits.prompt_bytes = static_cast<size_t>(options.prompt_bytes);
  if (const absl::Status status = InitLogging(
          {.level = options.log_level, .format = options.log_format, .process = "gateway"});
      !status.ok()) {
    return Fail(status);
  }
  auto server = GatewayServer::Start(options.gateway);
  if (!server.ok()) return Fail(server.status());
  if (const absl::Status status = Announce(options.announce, **server); !status.ok()) {
    return Fail(status);
  }
  spdlog::info("listening on {}", (*server)->address());

  int signal = 0;
  ::sigwait(&signals, &signal);
  spdlog::info("draining");
  const timespec now = {};
  const size_t cut = (*server)->Shutdown(options.drain_timeout, [&signals, &now] {
    return ::sigtimedwait(&signals, nullptr, &now) > 0;
  });
  spdlog::info("drained, {} calls cut short", cut);
  return kExitDrained;
}

}  // namespace
}  // namespace nibble::gateway

int main(int argc, char** argv) { return nibble::gateway::Main(argc, argv); }
