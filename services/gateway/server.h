// The gateway as a whole: its ports, its links to worker groups, its ticker, and how it ends.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "base/clock.h"
#include "base/metrics_server.h"
#include "base/tls_source.h"
#include "services/gateway/admin_service.h"
#include "services/gateway/core.h"
#include "services/gateway/group_link.h"
#include "services/gateway/services.h"

namespace nibble::gateway {

struct GatewayOptions {
  std::string listen = "127.0.0.1:50051";  // host:port or unix:path; port 0 takes a free one
  std::string metrics_listen = {};         // host:port; empty = none
  bool metrics_vllm_names = false;
  std::string admin_listen = {};         // host:port or unix:path; empty = none
  std::vector<std::string> groups = {};  // host:port or unix:path each
  TlsFiles tls = {};                     // of the gRPC ports; its CA signs clients
  TlsFiles groups_tls = {};              // towards the groups
  std::string groups_tls_name = {};      // in their certificates; empty = the address's
  std::string keys_file = {};            // base/api_keys.h; empty = anybody may call
  SamplingSource sampling = SamplingSource::kModel;
  Limits limits = {};
  RouterOptions router = {};
  Duration tick = std::chrono::milliseconds(100);
  // Seams for tests; empty = the real ones.
  const Clock* clock = nullptr;
  TokenizerFactory tokenizer_factory = {};
  std::function<std::string()> today = {};
};

class GatewayServer {
 public:
  // Listens on all its ports before it returns; groups may come later. INVALID_ARGUMENT names an
  // address that cannot be used.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<GatewayServer>> Start(GatewayOptions options);
  // Ends what is still running.
  ~GatewayServer();
  GatewayServer(const GatewayServer&) = delete;
  GatewayServer& operator=(const GatewayServer&) = delete;

  // Addresses as bound; empty where there is none.
  [[nodiscard]] const std::string& address() const { return address_; }
  [[nodiscard]] const std::string& admin_address() const { return admin_address_; }
  [[nodiscard]] std::string metrics_address() const;

  // No new work, or again. Health follows before this returns. Any thread.
  void SetDraining(bool draining);
  // Drains: waits until no call is in flight, until `timeout` has passed or `hurry` says so, then
  // ends what is left UNAVAILABLE. Returns how many calls that were. Once; nothing is served after.
  size_t Shutdown(Duration timeout, const std::function<bool()>& hurry = {});

  [[nodiscard]] Core& core() { return core_; }

 private:
  GatewayServer(GatewayOptions options, const Clock* clock);
  [[nodiscard]] absl::Status OpenTls();
  [[nodiscard]] absl::Status ConnectGroups();
  [[nodiscard]] std::shared_ptr<grpc::ServerCredentials> Credentials() const;
  [[nodiscard]] absl::Status StartPublic();
  [[nodiscard]] absl::Status StartAdmin();
  [[nodiscard]] absl::Status StartMetrics();
  void StartLinks();
  void Tick();
  void UpdateHealth();
  void UpdateGauges();

  const GatewayOptions options_;
  TlsStats tls_stats_;
  TlsStats groups_tls_stats_;
  std::unique_ptr<TlsSource> tls_;         // null: clear text
  std::unique_ptr<TlsSource> groups_tls_;  // likewise
  Core core_;
  InferenceServiceHandlers inference_;
  ModelServiceHandlers models_;
  AdminServiceHandlers admin_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<grpc::Server> admin_server_;
  std::unique_ptr<MetricsServer> metrics_server_;
  std::string address_;
  std::string admin_address_;
  std::vector<std::unique_ptr<GroupLink>> links_;

  absl::Mutex health_mutex_;
  std::map<std::string, bool> health_ ABSL_GUARDED_BY(health_mutex_);  // what was last said
  std::atomic<Deadline::rep> ticked_{0};
  std::atomic<bool> stopping_{false};
  bool shut_down_ = false;
  std::thread ticker_;
};

}  // namespace nibble::gateway
