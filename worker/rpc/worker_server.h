// The leader's gRPC server: WorkerService, health and reflection on one port.
#pragma once

#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "base/tls_source.h"
#include "worker/rpc/listen_address.h"
#include "worker/rpc/worker_service.h"

namespace nibble::rpc {

struct WorkerServerOptions {
  ListenAddress listen;
  TlsFiles tls = {};              // its CA signs the gateways' certificates; none: clear text
  TlsStats* tls_stats = nullptr;  // borrowed; null: nobody counts
  WorkerServiceOptions service;
  Duration tick = std::chrono::milliseconds(250);
};

// Opened once the group can serve. Health: "" is SERVING while the process lives and its group
// makes progress; "nibble.worker.v1.WorkerService" says whether it takes requests.
class WorkerServer {
 public:
  // INVALID_ARGUMENT: the address cannot be listened on, or a file of the TLS cannot be used.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<WorkerServer>> Start(
      WorkerServerOptions options);
  ~WorkerServer();  // as Shutdown(now)
  WorkerServer(const WorkerServer&) = delete;
  WorkerServer& operator=(const WorkerServer&) = delete;

  // "host:port" or "unix:path" as bound.
  [[nodiscard]] const std::string& address() const { return address_; }
  [[nodiscard]] WorkerService& service() { return *service_; }

  // NOT_SERVING at once, and the engine takes nothing new. Any thread, any number of times.
  void Drain();

  // Stops accepting calls; ends those still open at the deadline. One thread; the first call
  // counts.
  void Shutdown(Deadline deadline);

 private:
  WorkerServer() = default;
  void TickLoop(Duration tick);
  void UpdateHealth();

  std::unique_ptr<TlsSource> tls_;  // null: clear text
  std::unique_ptr<WorkerService> service_;
  std::unique_ptr<grpc::Server> server_;
  engine::Engine* engine_ = nullptr;
  const Clock* clock_ = nullptr;
  std::string address_;
  bool shut_down_ = false;

  absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool serving_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::HealthCheckServiceInterface* health_ ABSL_GUARDED_BY(mutex_) = nullptr;  // the server's
  std::thread ticker_;
};

}  // namespace nibble::rpc
