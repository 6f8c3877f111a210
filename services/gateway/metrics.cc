#include "services/gateway/metrics.h"

#include <utility>

#include "base/version.h"

namespace nibble::gateway {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;
using Buckets = prometheus::Histogram::BucketBoundaries;

// Distinct label values.
constexpr size_t kModelsMax = 64;
constexpr size_t kTenantsMax = 256;

Buckets RequestSeconds() {
  return {.05, .1, .2, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800};
}
Buckets FirstTokenSeconds() {
  return {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,
          .75,  1,    2.5, 5,   7.5, 10,  20,  40, 80,  160};
}
Buckets InterTokenSeconds() {
  return {.002, .004, .006, .008, .01, .015, .02, .025, .03, .04,
          .05,  .075, .1,   .15,  .2,  .3,   .5,  1,    2.5};
}
Buckets StageSeconds() {
  return {.0001, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10};
}
Buckets RpcSeconds() {
  return {.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800};
}
Buckets Tokens() {
  return {1,    2,    5,    10,    20,    50,    100,    200,   500,
          1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000};
}

struct RpcName {
  const char* service;
  const char* method;
};
constexpr char kInference[] = "nibble.inference.v1.InferenceService";
constexpr char kModel[] = "nibble.inference.v1.ModelService";
constexpr std::array<RpcName, kRpcCount> kRpcNames = {{{kInference, "Generate"},
                                                       {kInference, "GenerateStream"},
                                                       {kInference, "Chat"},
                                                       {kInference, "ChatStream"},
                                                       {kInference, "Tokenize"},
                                                       {kInference, "Detokenize"},
                                                       {kModel, "ListModels"},
                                                       {kModel, "GetModel"}}};

constexpr std::array<const char*, kStatusCodes> kCodeNames = {
    "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};

constexpr std::array<const char*, kFinishLabels> kFinishNames = {"none", "stop", "length", "eos",
                                                                 "stop_string"};
constexpr std::array<const char*, kRejections> kRejectionNames = {
    "invalid",   "context_length",  "unknown_model", "overloaded", "draining",
    "no_worker", "unauthenticated", "forbidden",     "quota",      "queue_full"};

}  // namespace

const char* RpcServiceName(Rpc rpc) { return kRpcNames[static_cast<size_t>(rpc)].service; }
const char* RpcMethodName(Rpc rpc) { return kRpcNames[static_cast<size_t>(rpc)].method; }

const char* StatusCodeName(absl::StatusCode code) {
  const auto index = static_cast<size_t>(code);
  return index < kStatusCodes ? kCodeNames[index] : "UNKNOWN";
}

GatewayMetrics::GatewayMetrics(const std::vector<std::string>& groups)
    : registry_(std::make_shared<prometheus::Registry>()) {
  DeclareRpcs();
  DeclareGroups(groups);
  DeclareGateway();
  DeclareModelFamilies();
}

void GatewayMetrics::DeclareRpcs() {
  auto& started = BuildCounter()
                      .Name("grpc_server_started_total")
                      .Help("RPCs started on the server.")
                      .Register(*registry_);
  auto& handled = BuildCounter()
                      .Name("grpc_server_handled_total")
                      .Help("RPCs completed on the server, by status code.")
                      .Register(*registry_);
  auto& seconds = BuildHistogram()
                      .Name("grpc_server_handling_seconds")
                      .Help("Time from the start of an RPC to its status.")
                      .Register(*registry_);
  for (size_t i = 0; i < kRpcCount; ++i) {
    const prometheus::Labels labels = {{"grpc_service", kRpcNames[i].service},
                                       {"grpc_method", kRpcNames[i].method}};
    rpcs[i].started = &started.Add(labels);
    rpcs[i].seconds = &seconds.Add(labels, RpcSeconds());
    for (size_t code = 0; code < kStatusCodes; ++code) {
      prometheus::Labels with_code = labels;
      with_code.emplace("grpc_code", kCodeNames[code]);
      rpcs[i].handled[code] = &handled.Add(with_code);
    }
  }
}

void GatewayMetrics::DeclareGroups(const std::vector<std::string>& groups) {
  auto& up = BuildGauge()
                 .Name("nibble_gateway_worker_up")
                 .Help("1 while the worker group is ready for requests.")
                 .Register(*registry_);
  auto& breaker = BuildGauge()
                      .Name("nibble_gateway_worker_breaker_state")
                      .Help("Breaker of the worker group: 0 closed, 1 half open, 2 open.")
                      .Register(*registry_);
  auto& inflight = BuildGauge()
                       .Name("nibble_gateway_worker_sequences_inflight")
                       .Help("Sequences of this gateway at the worker group.")
                       .Register(*registry_);
  auto& routed = BuildCounter()
                     .Name("nibble_gateway_routing_decisions_total")
                     .Help("Attempts sent to the worker group; fallback is a second attempt.")
                     .Register(*registry_);
  for (const std::string& group : groups) {
    WorkerMetrics& worker = workers.emplace_back();
    worker.up = &up.Add({{"worker", group}});
    worker.breaker_state = &breaker.Add({{"worker", group}});
    worker.sequences_inflight = &inflight.Add({{"worker", group}});
    worker.routed_first =
        &routed.Add({{"worker", group}, {"policy", "least_load"}, {"outcome", "least_load"}});
    worker.routed_fallback =
        &routed.Add({{"worker", group}, {"policy", "least_load"}, {"outcome", "fallback"}});
  }
}

void GatewayMetrics::DeclareGateway() {
  auto gauge = [this](const char* name, const char* help) {
    return &BuildGauge().Name(name).Help(help).Register(*registry_).Add({});
  };
  calls_inflight = gauge("nibble_gateway_calls_inflight", "RPCs that hold a place of the limit.");
  upstream_streams = gauge("nibble_gateway_upstream_streams", "Streams open to worker groups.");
  tokenize_queue_depth =
      gauge("nibble_gateway_tokenize_queue_depth", "Texts that wait for the tokenizing pool.");
  stream_buffered_bytes = gauge("nibble_gateway_stream_buffered_bytes",
                                "Events that wait for clients to read, all streams together.");
  draining = gauge("nibble_gateway_draining", "1 while no new work is taken.");
  auto& rejections = BuildCounter()
                         .Name("nibble_gateway_requests_rejected_total")
                         .Help("Requests refused before any worker saw them.")
                         .Register(*registry_);
  for (size_t i = 0; i < kRejections; ++i) {
    rejected[i] = &rejections.Add({{"reason", kRejectionNames[i]}});
  }
  auto& retries = BuildCounter()
                      .Name("nibble_gateway_retries_total")
                      .Help("Second attempts on another worker group.")
                      .Register(*registry_);
  retries_worker_lost = &retries.Add({{"reason", "worker_lost"}});
  retries_engine_fault = &retries.Add({{"reason", "engine_fault"}});
  auto& cancelled = BuildCounter()
                        .Name("nibble_gateway_stream_cancelled_total")
                        .Help("Requests ended before their time, by who ended them.")
                        .Register(*registry_);
  constexpr std::array<const char*, 3> kBy = {"client", "deadline", "server"};
  for (size_t i = 0; i < kBy.size(); ++i) stream_cancelled[i] = &cancelled.Add({{"by", kBy[i]}});
  auto& stages = BuildHistogram()
                     .Name("nibble_gateway_stage_duration_seconds")
                     .Help("Time a request spends in each stage of the gateway.")
                     .Register(*registry_);
  tokenize_seconds = &stages.Add({{"stage", "tokenize"}}, StageSeconds());
  route_seconds = &stages.Add({{"stage", "route"}}, StageSeconds());
  upstream_seconds = &stages.Add({{"stage", "upstream"}}, StageSeconds());
  detokenize_seconds = &stages.Add({{"stage", "detokenize"}}, StageSeconds());
  tenant_tokens_ = &BuildCounter()
                        .Name("nibble_gateway_tenant_tokens_total")
                        .Help("Tokens charged to the tenant's quota.")
                        .Register(*registry_);
  const BuildInfo& build = GetBuildInfo();
  BuildGauge()
      .Name("nibble_build_info")
      .Help("Which build this is; always 1.")
      .Register(*registry_)
      .Add({{"component", "gateway"},
            {"version", std::string(build.version)},
            {"git", std::string(build.git_revision)}})
      .Set(1);
}

void GatewayMetrics::DeclareModelFamilies() {
  auto gauge = [this](const char* name, const char* help) {
    return &BuildGauge().Name(name).Help(help).Register(*registry_);
  };
  auto counter = [this](const char* name, const char* help) {
    return &BuildCounter().Name(name).Help(help).Register(*registry_);
  };
  auto histogram = [this](const char* name, const char* help) {
    return &BuildHistogram().Name(name).Help(help).Register(*registry_);
  };
  families_.requests_inflight =
      gauge("nibble_gateway_requests_inflight", "Generation requests that have been admitted.");
  families_.ready =
      gauge("nibble_gateway_model_ready", "1 while a worker group that serves the model is ready.");
  families_.queue_depth = gauge("nibble_gateway_queue_depth",
                                "Requests that a group has been sent and has not admitted yet.");
  families_.prompt_tokens =
      counter("nibble_gateway_prompt_tokens_total", "Prompt tokens of admitted requests.");
  families_.generated_tokens =
      counter("nibble_gateway_generated_tokens_total", "Tokens delivered to clients.");
  families_.requests = counter("nibble_gateway_requests_total", "Generation requests that ended.");
  families_.request_seconds = histogram("nibble_gateway_request_duration_seconds",
                                        "Time from the arrival of a request to its status.");
  families_.prompt_tokens_histogram =
      histogram("nibble_gateway_request_prompt_tokens", "Prompt tokens of a request.");
  families_.generated_tokens_histogram =
      histogram("nibble_gateway_request_generated_tokens", "Tokens delivered for a request.");
  families_.inter_token_seconds = histogram("nibble_gateway_inter_token_latency_seconds",
                                            "Time between tokens of one choice, per token.");
  families_.time_to_first_token_seconds =
      histogram("nibble_gateway_time_to_first_token_seconds",
                "Time from the arrival of a request to its first token.");
}

std::unique_ptr<ModelMetrics> GatewayMetrics::NewModel(const std::string& label) {
  const prometheus::Labels labels = {{"model", label}};
  auto model = std::make_unique<ModelMetrics>();
  model->label = label;
  model->requests_inflight = &families_.requests_inflight->Add(labels);
  model->ready = &families_.ready->Add(labels);
  for (size_t i = 0; i < kPriorities; ++i) {
    prometheus::Labels with_priority = labels;
    with_priority.emplace("priority", PriorityWord(static_cast<Priority>(i)));
    model->queue_depth[i] = &families_.queue_depth->Add(with_priority);
  }
  model->prompt_tokens = &families_.prompt_tokens->Add(labels);
  model->generated_tokens = &families_.generated_tokens->Add(labels);
  model->request_seconds = &families_.request_seconds->Add(labels, RequestSeconds());
  model->prompt_tokens_histogram = &families_.prompt_tokens_histogram->Add(labels, Tokens());
  model->generated_tokens_histogram = &families_.generated_tokens_histogram->Add(labels, Tokens());
  model->inter_token_seconds = &families_.inter_token_seconds->Add(labels, InterTokenSeconds());
  for (size_t streaming = 0; streaming < 2; ++streaming) {
    prometheus::Labels with_kind = labels;
    with_kind.emplace("streaming", streaming == 1 ? "true" : "false");
    model->time_to_first_token_seconds[streaming] =
        &families_.time_to_first_token_seconds->Add(with_kind, FirstTokenSeconds());
  }
  return model;
}

const ModelMetrics& GatewayMetrics::ForModel(const std::string& name) {
  absl::MutexLock lock(&mutex_);
  std::string label = name.empty() ? "unknown" : name;
  auto found = models_.find(label);
  if (found == models_.end()) {
    if (models_.size() >= kModelsMax) label = "other";
    found = models_.find(label);
    if (found == models_.end()) found = models_.emplace(label, NewModel(label)).first;
  }
  return *found->second;
}

TenantMetrics GatewayMetrics::ForTenant(const std::string& name) {
  absl::MutexLock lock(&mutex_);
  const bool counted = tenants_.contains(name) || tenants_.size() < kTenantsMax;
  if (counted) tenants_.insert(name);
  const std::string label = counted ? name : "other";
  return {.prompt_tokens = &tenant_tokens_->Add({{"tenant", label}, {"type", "prompt"}}),
          .generated_tokens = &tenant_tokens_->Add({{"tenant", label}, {"type", "generated"}})};
}

void GatewayMetrics::RequestEnded(const ModelMetrics& model, absl::StatusCode code,
                                  FinishLabel finish) {
  families_.requests
      ->Add({{"model", model.label},
             {"code", StatusCodeName(code)},
             {"finish_reason", kFinishNames[static_cast<size_t>(finish)]}})
      .Increment();
}

}  // namespace nibble::gateway
