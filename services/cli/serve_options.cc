#include "services/cli/serve_options.h"

#include <sched.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/host_port.h"
#include "base/log_options.h"
#include "base/status.h"
#include "base/tls_options.h"
#include "base/units.h"
#include "worker/execution/cuda/gpu_rank.h"

namespace nibble::cli {
namespace {

constexpr int64_t kMemoryMin = int64_t{1} << 20;
constexpr int64_t kMemoryMax = int64_t{1} << 44;

const char* NumericsWord(weights::Numerics numerics) {
  return numerics == weights::Numerics::kFast ? "fast" : "exact";
}

const char* HeadWord(weights::HeadFormat head) {
  return head == weights::HeadFormat::kInt8 ? "int8" : "stored";
}

absl::Status CheckAddress(const char* key, const std::string& value) {
  const auto parsed = ParseHostPort(value);
  if (parsed.ok()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      key, " is \"", value, "\"; allowed: host:port, such as 127.0.0.1:9100 (port 0: any free)"));
}

}  // namespace

void DeclareNumerics(ConfigParser* parser, weights::Numerics* numerics, weights::HeadFormat* head) {
  parser->Choice<weights::Numerics>(
      "numerics", numerics,
      {{"fast", weights::Numerics::kFast}, {"exact", weights::Numerics::kExact}},
      "int8 or fp32 activations");
  parser->Choice<weights::HeadFormat>("head", head,
                                      {{"int8", weights::HeadFormat::kInt8},
                                       {"stored", weights::HeadFormat::kStored},
                                       {"fp16", weights::HeadFormat::kStored}},
                                      "How a 16-bit output head is held in fast mode; stored (or "
                                      "fp16): as in the file, with 16-bit "
                                      "activations");
}

void DeclareDevice(ConfigParser* parser, std::string* device, GpuChoice* gpu) {
  parser->Choice<std::string>("device", device, {{"cpu", "cpu"}, {"cuda", "cuda"}},
                              "Where ranks compute; cuda: each on a GPU of its own");
  parser->Choice<bool>("fusion", &gpu->fusion, {{"on", true}, {"off", false}},
                       "On GPUs: fused kernels and graphs, or a kernel per operation");
  parser->Choice<execution::Activations>(
      "activations", &gpu->activations, execution::ActivationsChoices(),
      "On GPUs: the type of activations and KV; auto: bf16 where config.json says bfloat16");
  parser->Number("memory_fraction", &gpu->memory_fraction, {0.05, 0.99},
                 "Share of a GPU's free memory that its rank may take");
}

absl::Status CheckDevice(const std::string& device) {
  return device == "cuda" ? execution::CheckGpuBuild() : absl::OkStatus();
}

void DeclareMemoryOptions(ConfigParser* parser, weights::MemoryOptions* options) {
  parser->Bytes(
      "memory", &options->memory_bytes, {0, kMemoryMax},
      "Budget of one rank, for everything; 0: what max_sequences need, within 2GiB of KV on CPUs "
      "and memory_fraction on GPUs");
  parser->Int("context", &options->max_context, {0, 1 << 24},
              "Positions of one sequence; 0: the model's");
  parser->Int("max_sequences", &options->max_slots, {1, 4096}, "Sequences that run at once");
  parser->Int("max_step_tokens", &options->max_step_tokens, {16, 1 << 16},
              "Tokens of one step, all sequences together");
  parser->Int("kv_blocks", &options->kv_blocks, {0, 1 << 28},
              "KV blocks of 16 positions; 0: what the budget leaves");
  DeclareNumerics(parser, &options->numerics, &options->head);
}

void DeclareServeOptions(ConfigParser* parser, ServeOptions* options) {
  parser->Group("Model");
  parser->Folder("model", &options->model, "Folder of the model").Positional().Required();
  parser->String("model_name", &options->model_name, "Its name for clients; empty: the folder's");
  parser->Group("Compute");
  parser->Int("tp", &options->tp, {1, 64}, "Ranks that share the model");
  DeclareDevice(parser, &options->device, &options->gpu);
  parser->Int("threads", &options->threads, {0, 1024}, "Threads of one rank; 0: a fair share");
  DeclareMemoryOptions(parser, &options->memory);
  parser->Group("Listening");
  parser->String("host", &options->host, "Address that clients reach");
  parser->Int("port", &options->port, {0, 65535}, "gRPC port; 0: any free");
  parser->String("metrics_listen", &options->metrics_listen, "The gateway's /metrics and probes");
  parser->String("worker_metrics_listen", &options->worker_metrics_listen,
                 "The workers' /metrics and probes");
  parser->Bool("metrics_vllm_names", &options->metrics_vllm_names,
               "vLLM's names beside nibble's, on /metrics");
  parser->String("admin_listen", &options->admin_listen, "Admin service; empty: none");
  parser->String("announce", &options->announce, "File that gets the addresses once all is ready");
  parser->Group("Security");
  DeclareServerTlsOptions(parser, &options->tls);
  parser->String("keys_file", &options->keys_file,
                 "TOML file of who may call (nibble keys new writes its lines); empty: anybody");
  parser->Group("Requests");
  parser->Int("queue_size", &options->queue_size, {1, 1 << 20}, "Requests that may wait");
  parser->Choice<bool>("prefix_cache", &options->prefix_cache, {{"on", true}, {"off", false}},
                       "Prompts that begin alike are computed once, for each tenant");
  parser->Choice<std::string>("sampling_defaults", &options->sampling_defaults,
                              {{"model", "model"}, {"nibble", "nibble"}},
                              "Whose defaults fill unset sampling fields");
  parser->Time("step_deadline", &options->step_deadline,
               {std::chrono::milliseconds(500), std::chrono::hours(1)},
               "A group without progress for this long is started again");
  parser->Time("drain_timeout", &options->drain_timeout,
               {std::chrono::seconds(0), std::chrono::hours(1)},
               "Longest wait for running requests when told to end");
  parser->Time("start_timeout", &options->start_timeout,
               {std::chrono::seconds(1), std::chrono::hours(24)}, "Longest wait for the model");
  parser->Group("Log");
  DeclareLogOptions(parser, &options->log_level, &options->log_format);
}

int32_t RankThreads(int32_t given, int32_t tp) {
  if (given > 0) return given;
  cpu_set_t set;
  CPU_ZERO(&set);
  const int32_t cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  return std::max(1, cores / tp);
}

absl::Status CheckServeOptions(const ServeOptions& options) {
  RETURN_IF_ERROR(CheckDevice(options.device));
  RETURN_IF_ERROR(CheckServerTls(options.tls));
  RETURN_IF_ERROR(CheckAddress("host", FormatHostPort(options.host, 0)));
  RETURN_IF_ERROR(CheckAddress("metrics_listen", options.metrics_listen));
  RETURN_IF_ERROR(CheckAddress("worker_metrics_listen", options.worker_metrics_listen));
  if (!options.admin_listen.empty()) {
    RETURN_IF_ERROR(CheckAddress("admin_listen", options.admin_listen));
  }
  if (options.memory.memory_bytes > 0 && options.memory.memory_bytes < kMemoryMin) {
    return absl::InvalidArgumentError(
        absl::StrCat("memory is \"", FormatBytes(options.memory.memory_bytes),
                     "\"; allowed: 0, or at least ", FormatBytes(kMemoryMin)));
  }
  return absl::OkStatus();
}

std::vector<std::string> WorkerCommandLine(const ServeOptions& options, const ServePaths& paths) {
  std::vector<std::string> line = {
      paths.programs + "/nibble-worker",
      "--model=" + options.model,
      absl::StrCat("--tp=", options.tp),
      "--device=" + options.device,
      "--listen=" + paths.worker_socket(),
      "--metrics-listen=" + options.worker_metrics_listen,
      "--announce=" + paths.worker_announce(),
      absl::StrCat("--numerics=", NumericsWord(options.memory.numerics)),
      absl::StrCat("--head=", HeadWord(options.memory.head)),
      absl::StrCat("--max-sequences=", options.memory.max_slots),
      absl::StrCat("--max-step-tokens=", options.memory.max_step_tokens),
      absl::StrCat("--queue-size=", options.queue_size),
      absl::StrCat("--prefix-cache=", options.prefix_cache ? "on" : "off"),
      "--step-deadline=" + FormatDuration(options.step_deadline),
      "--log-level=" + options.log_level,
      "--log-format=" + options.log_format,
  };
  const auto add_set = [&line](const char* flag, int64_t value) {
    if (value > 0) line.push_back(absl::StrCat(flag, "=", value));
  };
  if (!options.model_name.empty()) line.push_back("--model-name=" + options.model_name);
  if (options.metrics_vllm_names) line.emplace_back("--metrics-vllm-names");
  add_set("--threads", options.threads);
  add_set("--context", options.memory.max_context);
  add_set("--memory", options.memory.memory_bytes);
  add_set("--kv-blocks", options.memory.kv_blocks);
  if (options.device != "cpu") {
    line.push_back(absl::StrCat("--memory-fraction=", options.gpu.memory_fraction));
    line.push_back(absl::StrCat("--fusion=", options.gpu.fusion ? "on" : "off"));
    line.push_back(
        absl::StrCat("--activations=", execution::ActivationsWord(options.gpu.activations)));
  }
  return line;
}

std::vector<std::string> GatewayCommandLine(const ServeOptions& options, const ServePaths& paths) {
  std::vector<std::string> line = {
      paths.programs + "/nibble-gateway",
      "--listen=" + FormatHostPort(options.host, static_cast<uint16_t>(options.port)),
      "--metrics-listen=" + options.metrics_listen,
      "--groups=" + paths.worker_socket(),
      "--announce=" + paths.gateway_announce(),
      "--sampling-defaults=" + options.sampling_defaults,
      "--drain-timeout=" + FormatDuration(options.drain_timeout),
      "--log-level=" + options.log_level,
      "--log-format=" + options.log_format,
  };
  if (options.metrics_vllm_names) line.emplace_back("--metrics-vllm-names");
  for (const auto& [flag, value] : {std::pair{"--admin-listen=", &options.admin_listen},
                                    std::pair{"--keys-file=", &options.keys_file},
                                    std::pair{"--tls-cert=", &options.tls.certificate},
                                    std::pair{"--tls-key=", &options.tls.key},
                                    std::pair{"--tls-client-ca=", &options.tls.ca}}) {
    if (!value->empty()) line.push_back(flag + *value);
  }
  return line;
}

}  // namespace nibble::cli
