#include "base/metrics_server.h"

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>
#include <sys/socket.h>

#include <iterator>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/bounded_http_server.h"
#include "base/host_port.h"
#include "base/status.h"
#include "base/status_page.h"
#include "base/vllm_names.h"

namespace nibble {
namespace {

constexpr size_t kAnsweringThreads = 4;
constexpr Duration kStall = std::chrono::seconds(2);
constexpr size_t kRequestBytesMax = 16 * 1024;

std::string Exposition(const MetricsServer::Options& options) {
  std::vector<prometheus::MetricFamily> families;
  const auto add = [&families](std::vector<prometheus::MetricFamily> some) {
    families.insert(families.end(), std::make_move_iterator(some.begin()),
                    std::make_move_iterator(some.end()));
  };
  for (const auto& collectable : options.collectables) add(collectable->Collect());
  if (options.vllm_names) add(VllmFamilies(families));
  return prometheus::TextSerializer().Serialize(families);
}

httplib::Server::Handler Answer(MetricsServer::Probe probe) {
  return [probe = std::move(probe)](const httplib::Request&, httplib::Response& response) {
    const absl::Status status = probe ? probe() : absl::OkStatus();
    response.status = status.ok() ? 200 : 503;
    response.set_content(status.ok() ? "ok\n" : absl::StrCat(status.message(), "\n"),
                         "text/plain; charset=utf-8");
  };
}

}  // namespace

struct MetricsServer::State {
  Options options;
  BoundedHttpServer server{kRequestBytesMax, kStall};
  std::thread listener;
};

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(Options options) {
  ASSIGN_OR_RETURN(const HostPort where, ParseHostPort(options.address));
  auto state = std::make_unique<State>();
  state->options = std::move(options);
  BoundedHttpServer& server = state->server;

  server.new_task_queue = [] { return new httplib::ThreadPool(kAnsweringThreads); };
  // The library's own default is SO_REUSEPORT, with which two servers share a port unnoticed.
  server.set_socket_options([](socket_t socket) {
    const int yes = 1;
    ::setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  });
  server.set_payload_max_length(kRequestBytesMax);
  server.Get("/", [](const httplib::Request&, httplib::Response& response) {
    const std::string_view page = StatusPage();
    response.set_content(page.data(), page.size(), "text/html; charset=utf-8");
  });
  server.Get("/metrics", [raw = state.get()](const httplib::Request&, httplib::Response& response) {
    response.set_content(Exposition(raw->options), "text/plain; version=0.0.4; charset=utf-8");
  });
  server.Get("/healthz", Answer(state->options.live));
  server.Get("/readyz", Answer(state->options.ready));

  int port = where.port;
  if (port == 0) {
    port = server.bind_to_any_port(where.host);
  } else if (!server.bind_to_port(where.host, port)) {
    port = -1;
  }
  if (port <= 0) {
    return absl::InvalidArgumentError(absl::StrCat("metrics address ", state->options.address,
                                                   " cannot be bound (in use, or not local)"));
  }
  state->listener = std::thread([raw = state.get()] { raw->server.listen_after_bind(); });
  // stop() does nothing before the listener runs, so the object is handed out only when it does.
  while (!server.is_running()) std::this_thread::yield();

  auto metrics_server = std::unique_ptr<MetricsServer>(new MetricsServer(std::move(state)));
  metrics_server->address_ = FormatHostPort(where.host, static_cast<uint16_t>(port));
  return metrics_server;
}

MetricsServer::MetricsServer(std::unique_ptr<State> state) : state_(std::move(state)) {}

MetricsServer::~MetricsServer() {
  state_->server.stop();
  state_->listener.join();
}

}  // namespace nibble
