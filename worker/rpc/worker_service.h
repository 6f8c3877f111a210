// nibble.worker.v1.WorkerService over one engine: the leader's face to gateways.
#pragma once

#include <cstdint>
#include <functional>

#include "base/clock.h"
#include "nibble/worker/v1/worker.grpc.pb.h"
#include "worker/engine/engine.h"
#include "worker/rpc/generate_call.h"
#include "worker/rpc/load_watch.h"
#include "worker/rpc/outbox.h"
#include "worker/rpc/request_validation.h"
#include "worker/rpc/tokenizer_files.h"
#include "worker/step/group_stats.h"

namespace nibble::rpc {

struct WorkerServiceOptions {
  // Borrowed; outlive the service.
  engine::Engine* engine = nullptr;
  const Clock* clock = nullptr;
  step::EngineStats* stats = nullptr;
  const TokenizerFiles* tokenizer_files = nullptr;

  worker::v1::GetModelInfoResponse model_info;  // tokenizer_hash is filled in
  RequestLimits limits;
  // Whether the group can serve, beside what the engine says of itself. Any thread.
  std::function<bool()> group_ready = [] { return true; };
  // A gateway asked for a drain; the engine has already been told. gRPC's threads.
  std::function<void()> on_drain = [] {};
  // How long a reader may leave a message untaken. Above the gateway's own limit (30 s), which
  // can tell its client more.
  Duration stall_limit = std::chrono::seconds(40);
};

// One reactor per call. Thread-safe.
class WorkerService final : public worker::v1::WorkerService::CallbackService {
 public:
  explicit WorkerService(WorkerServiceOptions options);

  grpc::ServerWriteReactor<worker::v1::GenerateResponse>* Generate(
      grpc::CallbackServerContext* rpc, const worker::v1::GenerateRequest* request) override;
  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* rpc,
                                  const worker::v1::AbortRequest* request,
                                  worker::v1::AbortResponse* response) override;
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* rpc,
                                         const worker::v1::GetModelInfoRequest* request,
                                         worker::v1::GetModelInfoResponse* response) override;
  grpc::ServerWriteReactor<worker::v1::GetTokenizerResponse>* GetTokenizer(
      grpc::CallbackServerContext* rpc, const worker::v1::GetTokenizerRequest* request) override;
  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* rpc,
                                    const worker::v1::GetLoadRequest* request,
                                    worker::v1::GetLoadResponse* response) override;
  grpc::ServerWriteReactor<worker::v1::WatchLoadResponse>* WatchLoad(
      grpc::CallbackServerContext* rpc, const worker::v1::WatchLoadRequest* request) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* rpc,
                                  const worker::v1::DrainRequest* request,
                                  worker::v1::DrainResponse* response) override;

  // Pushes the load to its watchers and cuts off stalled readers. Called every 250 ms.
  void Tick();
  [[nodiscard]] worker::v1::Load CurrentLoad() const;
  // Streams of Generate that gRPC is not done with.
  [[nodiscard]] size_t open_streams() const { return open_calls_.count(); }
  // Ends the load watchers, so that a shutdown need not wait for them.
  void CloseWatchers() { watchers_.Close(); }

 private:
  WorkerServiceOptions options_;
  OpenCalls open_calls_;
  LoadWatchers watchers_;
  Outbox outbox_;  // last: its thread uses what stands above
};

}  // namespace nibble::rpc
