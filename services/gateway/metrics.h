// Everything the gateway exports, declared together. Every label comes from a closed set: names of
// RPCs, status codes, reasons, worker groups as configured, models as the groups name them.
#pragma once

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <array>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "base/api_keys.h"

namespace nibble::gateway {

enum class Rpc {
  kGenerate,
  kGenerateStream,
  kChat,
  kChatStream,
  kTokenize,
  kDetokenize,
  kListModels,
  kGetModel,
};
inline constexpr size_t kRpcCount = 8;
[[nodiscard]] const char* RpcServiceName(Rpc rpc);
[[nodiscard]] const char* RpcMethodName(Rpc rpc);

inline constexpr size_t kStatusCodes = 17;
// "OK", "INVALID_ARGUMENT" …; anything that is no canonical code is "UNKNOWN".
[[nodiscard]] const char* StatusCodeName(absl::StatusCode code);

struct RpcMetrics {
  prometheus::Counter* started = nullptr;
  std::array<prometheus::Counter*, kStatusCodes> handled{};  // by status code
  prometheus::Histogram* seconds = nullptr;
};

// How a request ended, for its finish_reason label.
enum class FinishLabel { kNone, kStop, kLength, kEos, kStopString };
inline constexpr size_t kFinishLabels = 5;

struct ModelMetrics {
  std::string label;
  prometheus::Gauge* requests_inflight = nullptr;
  prometheus::Gauge* ready = nullptr;
  std::array<prometheus::Gauge*, kPriorities> queue_depth{};
  prometheus::Counter* prompt_tokens = nullptr;
  prometheus::Counter* generated_tokens = nullptr;
  prometheus::Histogram* request_seconds = nullptr;
  prometheus::Histogram* prompt_tokens_histogram = nullptr;
  prometheus::Histogram* generated_tokens_histogram = nullptr;
  prometheus::Histogram* inter_token_seconds = nullptr;
  std::array<prometheus::Histogram*, 2> time_to_first_token_seconds{};  // unary, streaming
};

struct WorkerMetrics {
  prometheus::Gauge* up = nullptr;
  prometheus::Gauge* breaker_state = nullptr;  // 0 closed, 1 half open, 2 open
  prometheus::Gauge* sequences_inflight = nullptr;
  prometheus::Counter* routed_first = nullptr;
  prometheus::Counter* routed_fallback = nullptr;
};

// Tokens of one tenant, over all of its keys.
struct TenantMetrics {
  prometheus::Counter* prompt_tokens = nullptr;
  prometheus::Counter* generated_tokens = nullptr;
};

enum class Rejection {
  kInvalid,
  kContextLength,
  kUnknownModel,
  kOverloaded,
  kDraining,
  kNoWorker,
  kUnauthenticated,
  kForbidden,
  kQuota,
  kQueueFull,
};
inline constexpr size_t kRejections = 10;

enum class CancelledBy { kClient, kDeadline, kServer };

// Thread-safe. Metrics of models appear when a group first names the model.
class GatewayMetrics {
 public:
  explicit GatewayMetrics(const std::vector<std::string>& groups);

  [[nodiscard]] std::shared_ptr<prometheus::Registry> registry() const { return registry_; }

  // The model's own, "other" past the bound on distinct models, "unknown" for the empty name.
  [[nodiscard]] const ModelMetrics& ForModel(const std::string& name);
  // A tenant of the keys file; "other" past the bound on distinct tenants.
  [[nodiscard]] TenantMetrics ForTenant(const std::string& name);
  // Counts one ended request.
  void RequestEnded(const ModelMetrics& model, absl::StatusCode code, FinishLabel finish);

  std::array<RpcMetrics, kRpcCount> rpcs;
  std::vector<WorkerMetrics> workers;  // as configured
  std::array<prometheus::Counter*, kRejections> rejected{};
  std::array<prometheus::Counter*, 3> stream_cancelled{};  // by CancelledBy
  prometheus::Counter* retries_worker_lost = nullptr;
  prometheus::Counter* retries_engine_fault = nullptr;
  prometheus::Histogram* tokenize_seconds = nullptr;
  prometheus::Histogram* route_seconds = nullptr;
  prometheus::Histogram* upstream_seconds = nullptr;    // from sending to admitted
  prometheus::Histogram* detokenize_seconds = nullptr;  // all tokens of a request together
  prometheus::Gauge* calls_inflight = nullptr;
  prometheus::Gauge* upstream_streams = nullptr;
  prometheus::Gauge* tokenize_queue_depth = nullptr;
  prometheus::Gauge* stream_buffered_bytes = nullptr;
  prometheus::Gauge* draining = nullptr;

 private:
  void DeclareRpcs();
  void DeclareGroups(const std::vector<std::string>& groups);
  void DeclareGateway();
  void DeclareModelFamilies();
  [[nodiscard]] std::unique_ptr<ModelMetrics> NewModel(const std::string& label);

  std::shared_ptr<prometheus::Registry> registry_;
  struct ModelFamilies {
    prometheus::Family<prometheus::Gauge>* requests_inflight = nullptr;
    prometheus::Family<prometheus::Gauge>* ready = nullptr;
    prometheus::Family<prometheus::Gauge>* queue_depth = nullptr;
    prometheus::Family<prometheus::Counter>* prompt_tokens = nullptr;
    prometheus::Family<prometheus::Counter>* generated_tokens = nullptr;
    prometheus::Family<prometheus::Counter>* requests = nullptr;
    prometheus::Family<prometheus::Histogram>* request_seconds = nullptr;
    prometheus::Family<prometheus::Histogram>* prompt_tokens_histogram = nullptr;
    prometheus::Family<prometheus::Histogram>* generated_tokens_histogram = nullptr;
    prometheus::Family<prometheus::Histogram>* inter_token_seconds = nullptr;
    prometheus::Family<prometheus::Histogram>* time_to_first_token_seconds = nullptr;
  } families_;
  prometheus::Family<prometheus::Counter>* tenant_tokens_ = nullptr;
  absl::Mutex mutex_;
  std::set<std::string> tenants_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, std::unique_ptr<ModelMetrics>> models_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace nibble::gateway
