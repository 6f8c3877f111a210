#include "worker/rpc/worker_server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/grpc_header_bound.h"
#include "base/status.h"
#include "base/tls_options.h"

namespace nibble::rpc {
namespace {

constexpr int kReceiveBytesMax = 4 << 20;
constexpr int kSendBytesMax = 64 << 20;
constexpr int kMetadataBytesMax = 8 << 10;
constexpr int kKeepaliveMs = 10'000;
constexpr int kKeepaliveTimeoutMs = 5'000;
// Below the gateway's ping interval of 10 s: a server that counts pings as too many closes the
// connection and with it every stream.
constexpr int kPingIntervalMinMs = 5'000;

void Configure(grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(kReceiveBytesMax);
  builder->SetMaxSendMessageSize(kSendBytesMax);
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMetadataBytesMax);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                              kPingIntervalMinMs);
  // Two servers on one port would each get some of the calls.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
}

std::chrono::system_clock::time_point WallTime(Deadline deadline, const Clock& clock) {
  const Duration left = std::max(Duration::zero(), deadline - clock.Now());
  return std::chrono::system_clock::now() +
         std::chrono::duration_cast<std::chrono::system_clock::duration>(left);
}

}  // namespace

absl::StatusOr<std::unique_ptr<WorkerServer>> WorkerServer::Start(WorkerServerOptions options) {
  // gRPC replaces a unix socket that is in use without a word.
  RETURN_IF_ERROR(CheckAvailable(options.listen));
  BoundGrpcHeaderBlocks(kMetadataBytesMax);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();

  std::unique_ptr<WorkerServer> server(new WorkerServer());
  std::shared_ptr<grpc::ServerCredentials> credentials = grpc::InsecureServerCredentials();
  if (options.tls.any()) {
    RETURN_IF_ERROR(CheckServerTls(options.tls));
    ASSIGN_OR_RETURN(server->tls_, TlsSource::Open({.files = options.tls,
                                                    .names = ServerTlsNames(),
                                                    .stats = options.tls_stats}));
    credentials = server->tls_->ServerCredentials();
  }
  server->engine_ = options.service.engine;
  server->clock_ = options.service.clock;
  server->service_ = std::make_unique<WorkerService>([&] {
    // A drain asked for by RPC must show in the health at once, as one asked for by signal does.
    options.service.on_drain = [raw = server.get(), next = options.service.on_drain] {
      raw->UpdateHealth();
      next();
    };
    return std::move(options.service);
  }());

  grpc::ServerBuilder builder;
  Configure(&builder);
  int port = 0;
  builder.AddListeningPort(options.listen.ToString(), credentials, &port);
  builder.RegisterService(server->service_.get());
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || port == 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("listen address ", options.listen.ToString(), " cannot be bound"));
  }
  if (options.listen.unix_path.empty()) options.listen.port = static_cast<uint16_t>(port);
  server->address_ = options.listen.ToString();
  {
    // Calls may have come already, and with them a drain.
    const absl::MutexLock lock(&server->mutex_);
    server->health_ = server->server_->GetHealthCheckService();
    server->health_->SetServingStatus(worker::v1::WorkerService::service_full_name(), false);
  }
  server->UpdateHealth();
  server->ticker_ = std::thread([raw = server.get(), tick = options.tick] { raw->TickLoop(tick); });
  return server;
}

WorkerServer::~WorkerServer() {
  if (ticker_.joinable()) Shutdown(clock_->Now());
}

void WorkerServer::UpdateHealth() {
  const bool ready = service_->CurrentLoad().ready();
  const absl::MutexLock lock(&mutex_);
  if (health_ == nullptr || ready == serving_ || stopping_) return;
  serving_ = ready;
  health_->SetServingStatus(worker::v1::WorkerService::service_full_name(), ready);
}

void WorkerServer::TickLoop(Duration tick) {
  for (;;) {
    {
      const absl::MutexLock lock(&mutex_);
      if (mutex_.AwaitWithTimeout(absl::Condition(&stopping_), absl::FromChrono(tick))) return;
    }
    UpdateHealth();
    service_->Tick();
  }
}

void WorkerServer::Drain() {
  engine_->Drain();
  UpdateHealth();
}

void WorkerServer::Shutdown(Deadline deadline) {
  if (std::exchange(shut_down_, true)) return;
  {
    const absl::MutexLock lock(&mutex_);
    stopping_ = true;
    health_->SetServingStatus(false);
  }
  ticker_.join();
  service_->CloseWatchers();
  server_->Shutdown(WallTime(deadline, *clock_));
}

}  // namespace nibble::rpc
