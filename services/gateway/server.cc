#include "services/gateway/server.h"

#include <google/protobuf/stubs/logging.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>

#include <ctime>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/grpc_header_bound.h"
#include "base/host_port.h"
#include "base/logging.h"
#include "base/status.h"
#include "base/tls_metrics.h"
#include "base/tls_options.h"
#include "services/gateway/status_contract.h"

namespace nibble::gateway {
namespace {

constexpr Duration kPoll = std::chrono::milliseconds(10);
constexpr Duration kFlush = std::chrono::milliseconds(500);  // for statuses of calls that were cut
constexpr Duration kLive = std::chrono::seconds(5);          // the ticker's longest silence

std::string Today() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  localtime_r(&now, &parts);
  char text[32];
  const size_t size = std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &parts);
  return std::string(text, size);
}

GatewayOptions WithDefaults(GatewayOptions options) {
  if (!options.tokenizer_factory) options.tokenizer_factory = text::Tokenizer::Create;
  if (!options.today) options.today = Today;
  return options;
}

void SetTransport(const Limits& limits, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(limits.receive_message_bytes);
  builder->SetMaxSendMessageSize(limits.send_message_bytes);
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, limits.metadata_bytes);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, limits.streams_per_connection);
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // two servers on one port: an error
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 20'000);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, 30 * 60'000);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS, 60 * 60'000);
  // What gRPC itself holds of a stream that is not read.
  builder->AddChannelArgument(GRPC_ARG_HTTP2_WRITE_BUFFER_SIZE, 16 << 10);
}

// Where keys are asked for nothing is left that asks for none: reflection cannot.
class WithoutReflection final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments* /*arguments*/) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    std::erase_if(*plugins, [](const auto& plugin) {
      return absl::StrContains(plugin->name(), "reflection");
    });
  }
};

absl::Status CannotListen(const char* key, const std::string& address) {
  return absl::InvalidArgumentError(absl::StrCat(
      key, " \"", address, "\" cannot be listened on: in use, or not of this machine"));
}

// Listens on `address` and says where; INVALID_ARGUMENT where that is not possible.
absl::StatusOr<std::unique_ptr<grpc::Server>> Listen(const char* key, const std::string& address,
                                                     std::shared_ptr<grpc::ServerCredentials> tls,
                                                     grpc::ServerBuilder* builder,
                                                     std::string* bound) {
  const bool is_unix = absl::StartsWith(address, "unix:");
  HostPort host_port;
  if (!is_unix) {
    ASSIGN_OR_RETURN(host_port, ParseHostPort(address));
  }
  int port = 0;
  builder->AddListeningPort(address, std::move(tls), &port);
  std::unique_ptr<grpc::Server> server = builder->BuildAndStart();
  if (server == nullptr || port == 0) return CannotListen(key, address);
  *bound = is_unix ? address : FormatHostPort(host_port.host, static_cast<uint16_t>(port));
  return server;
}

}  // namespace

absl::StatusOr<std::unique_ptr<GatewayServer>> GatewayServer::Start(GatewayOptions options) {
  static const SteadyClock kSteady;
  // Parse errors become statuses; protobuf's own lines on stderr would add nothing to them.
  google::protobuf::SetLogHandler(nullptr);
  const Clock* clock = options.clock == nullptr ? &kSteady : options.clock;
  std::unique_ptr<GatewayServer> server(new GatewayServer(WithDefaults(std::move(options)), clock));
  BoundGrpcHeaderBlocks(static_cast<size_t>(server->options_.limits.metadata_bytes));
  RETURN_IF_ERROR(server->OpenTls());
  RETURN_IF_ERROR(server->ConnectGroups());
  if (const std::string& keys = server->options_.keys_file; !keys.empty()) {
    ASSIGN_OR_RETURN(
        server->core_.callers,
        Callers::Open({.path = keys, .clock = clock, .metrics = &server->core_.metrics}));
  }
  RETURN_IF_ERROR(server->StartPublic());
  RETURN_IF_ERROR(server->StartAdmin());
  RETURN_IF_ERROR(server->StartMetrics());
  server->StartLinks();
  return server;
}

GatewayServer::GatewayServer(GatewayOptions options, const Clock* clock)
    : options_(std::move(options)),
      core_(options_.limits, options_.groups, options_.router, clock),
      inference_(&core_),
      models_(&core_),
      admin_(&core_, [this](bool draining) { SetDraining(draining); }) {
  core_.today = options_.today;
}

absl::Status GatewayServer::OpenTls() {
  if (!options_.tls.any()) return absl::OkStatus();
  RETURN_IF_ERROR(CheckServerTls(options_.tls));
  ASSIGN_OR_RETURN(
      tls_,
      TlsSource::Open({.files = options_.tls, .names = ServerTlsNames(), .stats = &tls_stats_}));
  return absl::OkStatus();
}

absl::Status GatewayServer::ConnectGroups() {
  WorkerChannelOptions channel = {.limits = options_.limits, .tls_name = options_.groups_tls_name};
  if (options_.groups_tls.any()) {
    // The groups' certificates are by an authority of their own, not by one of the web's.
    if (options_.groups_tls.ca.empty()) {
      return absl::InvalidArgumentError("groups_tls.ca is not set; it goes with groups_tls.cert");
    }
    ASSIGN_OR_RETURN(groups_tls_, TlsSource::Open({.files = options_.groups_tls,
                                                   .names = {.certificate = "groups_tls.cert",
                                                             .key = "groups_tls.key",
                                                             .ca = "groups_tls.ca"},
                                                   .stats = &groups_tls_stats_}));
    channel.tls = groups_tls_->ChannelCredentials();
  }
  for (const std::string& address : options_.groups) {
    core_.workers.push_back(worker::v1::WorkerService::NewStub(NewWorkerChannel(address, channel)));
  }
  return absl::OkStatus();
}

std::shared_ptr<grpc::ServerCredentials> GatewayServer::Credentials() const {
  return tls_ == nullptr ? grpc::InsecureServerCredentials() : tls_->ServerCredentials();
}

absl::Status GatewayServer::StartPublic() {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  SetTransport(options_.limits, &builder);
  if (core_.callers != nullptr) builder.SetOption(std::make_unique<WithoutReflection>());
  builder.RegisterService(&inference_);
  builder.RegisterService(&models_);
  ASSIGN_OR_RETURN(server_, Listen("listen", options_.listen, Credentials(), &builder, &address_));
  UpdateHealth();
  return absl::OkStatus();
}

absl::Status GatewayServer::StartAdmin() {
  if (options_.admin_listen.empty()) return absl::OkStatus();
  grpc::ServerBuilder builder;
  SetTransport(options_.limits, &builder);
  if (core_.callers != nullptr) builder.SetOption(std::make_unique<WithoutReflection>());
  builder.RegisterService(&admin_);
  ASSIGN_OR_RETURN(admin_server_, Listen("admin_listen", options_.admin_listen, Credentials(),
                                         &builder, &admin_address_));
  return absl::OkStatus();
}

absl::Status GatewayServer::StartMetrics() {
  if (options_.metrics_listen.empty()) return absl::OkStatus();
  MetricsServer::Options options;
  options.address = options_.metrics_listen;
  options.vllm_names = options_.metrics_vllm_names;
  options.collectables = {core_.metrics.registry(),
                          std::make_shared<TlsMetrics>(std::vector<TlsMetrics::Use>{
                              {.label = "listen", .stats = &tls_stats_},
                              {.label = "groups", .stats = &groups_tls_stats_}})};
  options.live = [this] {
    const auto silent = core_.clock->Now() - Deadline(Duration(ticked_.load()));
    return silent <= kLive ? absl::OkStatus() : absl::UnavailableError("the ticker hangs");
  };
  options.ready = [this] {
    if (core_.draining.load()) return absl::UnavailableError("draining");
    if (!core_.router.AnyReady()) return absl::UnavailableError("no worker group is ready");
    // Who reads that this is ready finds the gRPC health service saying so too.
    UpdateHealth();
    return absl::OkStatus();
  };
  ticked_.store(core_.clock->Now().time_since_epoch().count());
  auto server = MetricsServer::Start(std::move(options));
  if (!server.ok()) return CannotListen("metrics_listen", options_.metrics_listen);
  metrics_server_ = *std::move(server);
  return absl::OkStatus();
}

void GatewayServer::StartLinks() {
  for (size_t i = 0; i < options_.groups.size(); ++i) {
    links_.push_back(std::make_unique<GroupLink>(
        &core_, GroupLink::Options{.group = i,
                                   .sampling = options_.sampling,
                                   .tokenizer_factory = options_.tokenizer_factory}));
  }
  ticker_ = std::thread([this] {
    while (!stopping_.load()) {
      Tick();
      std::this_thread::sleep_for(options_.tick);
    }
  });
}

std::string GatewayServer::metrics_address() const {
  return metrics_server_ == nullptr ? std::string() : metrics_server_->address();
}

void GatewayServer::Tick() {
  ticked_.store(core_.clock->Now().time_since_epoch().count());
  core_.calls.SweepAll(core_.clock->Now());
  UpdateHealth();
  UpdateGauges();
}

void GatewayServer::UpdateHealth() {
  absl::MutexLock lock(&health_mutex_);
  const bool draining = core_.draining.load();
  const bool ready = core_.router.AnyReady() && !draining;
  std::map<std::string, bool> now = {{"", true},  // the process lives, draining or not
                                     {RpcServiceName(Rpc::kGenerate), ready},
                                     {RpcServiceName(Rpc::kListModels), ready}};
  for (const GroupSnapshot& group : core_.router.Snapshot()) {
    if (group.model.empty()) continue;
    bool& serving = now["model/" + group.model];
    serving = serving || (group.ready && !draining);
  }
  for (const auto& [name, serving] : now) {
    const auto before = health_.find(name);
    if (before != health_.end() && before->second == serving) continue;
    server_->GetHealthCheckService()->SetServingStatus(name, serving);
    // Where it all begins is no news.
    if (!name.empty() && (serving || before != health_.end()))
      spdlog::info("{} is {}", name, serving ? "SERVING" : "NOT_SERVING");
  }
  // A model that no group names any more is not served.
  for (const auto& [name, serving] : health_) {
    if (now.contains(name)) continue;
    if (serving) server_->GetHealthCheckService()->SetServingStatus(name, false);
    now[name] = false;
  }
  health_ = std::move(now);
}

void GatewayServer::UpdateGauges() {
  GatewayMetrics& metrics = core_.metrics;
  std::map<std::string, bool> models;
  const std::vector<GroupSnapshot> groups = core_.router.Snapshot();
  for (size_t i = 0; i < groups.size(); ++i) {
    metrics.workers[i].up->Set(groups[i].ready ? 1 : 0);
    metrics.workers[i].breaker_state->Set(static_cast<double>(groups[i].breaker));
    metrics.workers[i].sequences_inflight->Set(groups[i].in_flight);
    if (groups[i].model.empty()) continue;
    bool& ready = models[groups[i].model];
    ready = ready || groups[i].ready;
  }
  for (const auto& [name, ready] : models) metrics.ForModel(name).ready->Set(ready ? 1 : 0);
  metrics.calls_inflight->Set(static_cast<double>(core_.calls.size()));
  metrics.upstream_streams->Set(static_cast<double>(core_.upstreams.count()));
  metrics.tokenize_queue_depth->Set(static_cast<double>(core_.pool.depth()));
  metrics.draining->Set(core_.draining.load() ? 1 : 0);
}

void GatewayServer::SetDraining(bool draining) {
  if (core_.draining.exchange(draining) == draining) return;
  spdlog::info("{}", draining ? "draining: no new work" : "takes work again");
  UpdateHealth();
}

size_t GatewayServer::Shutdown(Duration timeout, const std::function<bool()>& hurry) {
  SetDraining(true);
  const Deadline until = core_.clock->Now() + timeout;
  while (core_.calls.size() > 0 && core_.clock->Now() < until && !(hurry && hurry())) {
    std::this_thread::sleep_for(kPoll);
  }
  const size_t cut = core_.calls.size();
  if (cut > 0) {
    spdlog::warn("{} calls are cut short", cut);
    core_.calls.CutAll(DrainCutError());
    const Deadline flushed = core_.clock->Now() + kFlush;
    while (core_.calls.size() > 0 && core_.clock->Now() < flushed) {
      std::this_thread::sleep_for(kPoll);
    }
  }
  // Health watches and readers that do not read are ended here.
  const auto last = std::chrono::system_clock::now() + kFlush;
  server_->Shutdown(last);
  if (admin_server_ != nullptr) admin_server_->Shutdown(last);
  shut_down_ = true;
  return cut;
}

GatewayServer::~GatewayServer() {
  if (ticker_.joinable() && !shut_down_) Shutdown(Duration::zero());
  stopping_.store(true);
  if (ticker_.joinable()) ticker_.join();
  links_.clear();
  core_.upstreams.WaitForNone();
  metrics_server_.reset();
}

}  // namespace nibble::gateway
