#include "worker/options.h"

#include <sched.h>

#include <algorithm>
#include <filesystem>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/host_port.h"
#include "base/log_options.h"
#include "base/status.h"
#include "base/tls_options.h"
#include "base/units.h"
#include "worker/execution/cuda/gpu_rank.h"
#include "worker/fnv.h"
#include "worker/rpc/listen_address.h"
#include "worker/step/group_stats.h"

namespace nibble::worker {
namespace {

constexpr size_t kModelNameMax = 200;

// Of those that this process may run on: a container often has fewer than the machine.
int32_t CoreCount() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return ::sched_getaffinity(0, sizeof(set), &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

absl::Status Bad(const char* key, const std::string& value, const std::string& allowed) {
  return absl::InvalidArgumentError(absl::StrCat(key, " is \"", value, "\"; allowed: ", allowed));
}

// What only GPUs have, beside the memory.
void DeclareGpuOptions(ConfigParser* parser, WorkerOptions* options) {
  parser->Choice<bool>("fusion", &options->fusion, {{"on", true}, {"off", false}},
                       "On GPUs: fused kernels and graphs, or a kernel per operation");
  parser->Choice<execution::Activations>(
      "activations", &options->activations, execution::ActivationsChoices(),
      "On GPUs: the type of activations and KV; auto: bf16 where config.json says bfloat16");
}

}  // namespace

const char* NumericsWord(weights::Numerics numerics) {
  return numerics == weights::Numerics::kFast ? "fast" : "exact";
}

const char* HeadWord(weights::HeadFormat head) {
  return head == weights::HeadFormat::kInt8 ? "int8" : "stored";
}

void DeclareOptions(ConfigParser* parser, WorkerOptions* options) {
  using std::chrono::hours;
  using std::chrono::milliseconds;
  parser->Group("Model");
  parser->Folder("model", &options->model, "Folder of the model").Required();
  parser->String("model_name", &options->model_name, "Its name for clients; empty: the folder's");
  parser->Group("Compute");
  parser->Int("tp", &options->tp, {1, step::kMaxRanks}, "Ranks that share the model");
  parser->Choice<std::string>("device", &options->device, {{"cpu", "cpu"}, {"cuda", "cuda"}},
                              "Where ranks compute; cuda: each on a GPU of its own");
  DeclareGpuOptions(parser, options);
  parser->Int("threads", &options->threads, {0, 1024}, "Threads of one rank; 0: a fair share");
  parser->Choice<weights::Numerics>(
      "numerics", &options->memory.numerics,
      {{"fast", weights::Numerics::kFast}, {"exact", weights::Numerics::kExact}},
      "int8 or fp32 activations");
  parser->Choice<weights::HeadFormat>("head", &options->memory.head,
                                      {{"int8", weights::HeadFormat::kInt8},
                                       {"stored", weights::HeadFormat::kStored},
                                       {"fp16", weights::HeadFormat::kStored}},
                                      "How a 16-bit output head is held in fast mode; stored (or "
                                      "fp16): as in the file, with 16-bit "
                                      "activations");
  parser->Int("max_sequences", &options->memory.max_slots, {1, 4096}, "Sequences that run at once");
  parser->Int("max_step_tokens", &options->memory.max_step_tokens, {16, 1 << 16},
              "Tokens of one step, all sequences together");
  parser->Int("context", &options->memory.max_context, {0, 1 << 24},
              "Positions of one sequence; 0: the model's");
  parser->Bytes(
      "memory", &options->memory.memory_bytes, {0, int64_t{1} << 44},
      "Budget of one rank, for everything; 0: what max_sequences need, within 2GiB of KV on CPUs "
      "and memory_fraction on GPUs");
  parser->Number("memory_fraction", &options->memory_fraction, {0.05, 0.99},
                 "Share of a GPU's free memory that its rank may take");
  parser->Int("kv_blocks", &options->memory.kv_blocks, {0, 1 << 28},
              "KV blocks of 16 positions; 0: what the budget leaves");
  parser->Group("Several machines");
  parser->Int("group_size", &options->group_size, {1, step::kMaxRanks},
              "Machines that share the model; unset: LWS_GROUP_SIZE, else 1");
  parser->Int("group_index", &options->group_index, {0, step::kMaxRanks - 1},
              "This machine, the leader's is 0; unset: LWS_WORKER_INDEX");
  parser->String("group_leader", &options->group_leader,
                 "The leader's machine: host or host:port; unset: LWS_LEADER_ADDRESS");
  parser->Time("join_timeout", &options->join_timeout, {std::chrono::seconds(1), hours(24)},
               "For every machine to come");
  parser->Group("Listening");
  parser->String("listen", &options->listen, "gRPC: host:port or unix:PATH");
  parser->String("metrics_listen", &options->metrics_listen,
                 "/metrics, /healthz and /readyz: host:port; empty: none");
  parser->Bool("metrics_vllm_names", &options->metrics_vllm_names,
               "vLLM's names beside nibble's, on /metrics");
  parser->String("announce", &options->announce,
                 "File that gets the addresses once the group serves");
  parser->Group("Security");
  DeclareServerTlsOptions(parser, &options->tls);
  parser->Group("Requests");
  parser->Int("queue_size", &options->queue_size, {1, 1 << 20}, "Requests that may wait");
  parser->Choice<bool>("prefix_cache", &options->prefix_cache, {{"on", true}, {"off", false}},
                       "Prompts that begin alike are computed once, for each tenant");
  parser->Time("step_deadline", &options->step_deadline, {milliseconds(500), hours(1)},
               "A group without progress for this long ends; half of it is logged");
  parser->Time("drain_timeout", &options->drain_timeout, {Duration::zero(), hours(24)},
               "After SIGTERM, what runs may take this long");
  parser->Group("Logging");
  DeclareLogOptions(parser, &options->log_level, &options->log_format);
  DeclareTerminationLog(parser, &options->termination_log);
}

absl::Status TakeLeaderWorkerSet(const ConfigParser::GetEnv& env, WorkerOptions* options) {
  const auto number = [&env](const char* name, bool unset, int32_t* target) {
    const char* text = env(name);
    if (!unset || text == nullptr) return absl::OkStatus();
    if (absl::SimpleAtoi(text, target)) return absl::OkStatus();
    return Bad(name, text, "a number");
  };
  RETURN_IF_ERROR(number("LWS_GROUP_SIZE", options->group_size == 0, &options->group_size));
  RETURN_IF_ERROR(number("LWS_WORKER_INDEX", options->group_index < 0, &options->group_index));
  const char* leader = env("LWS_LEADER_ADDRESS");
  if (options->group_leader.empty() && leader != nullptr) options->group_leader = leader;
  return absl::OkStatus();
}

group::MachinePlace PlaceOf(const WorkerOptions& options) {
  return {.index = options.group_index,
          .machines = options.group_size,
          .ranks_each = options.tp / options.group_size};
}

namespace {

absl::Status CompletePlace(WorkerOptions* options) {
  if (options->group_size == 0) options->group_size = 1;
  if (options->group_size < 1 || options->tp % options->group_size != 0) {
    return Bad("group_size", absl::StrCat(options->group_size),
               absl::StrCat("a divisor of tp, which is ", options->tp));
  }
  if (options->group_size == 1) {
    options->group_index = 0;
    return absl::OkStatus();
  }
  if (options->group_index < 0 || options->group_index >= options->group_size) {
    return Bad("group_index", absl::StrCat(options->group_index),
               absl::StrCat("0 to ", options->group_size - 1));
  }
  std::string with_port = options->group_leader;
  if (!ParseHostPort(with_port).ok()) with_port = FormatHostPort(with_port, kGroupPort);
  if (options->group_leader.empty() || !ParseHostPort(with_port).ok()) {
    return Bad("group_leader", options->group_leader, "host or host:port of the leader's machine");
  }
  options->group_leader = with_port;
  return absl::OkStatus();
}

}  // namespace

absl::Status CompleteOptions(WorkerOptions* options) {
  if (options->model_name.empty()) {
    std::error_code error;
    const auto folder = std::filesystem::weakly_canonical(options->model, error);
    // A slash at the end leaves an empty last part.
    options->model_name = (folder / "").parent_path().filename().string();
    if (options->model_name.empty()) options->model_name = "model";
  }
  if (options->model_name.size() > kModelNameMax ||
      !std::all_of(options->model_name.begin(), options->model_name.end(), absl::ascii_isprint)) {
    return Bad("model_name", options->model_name,
               absl::StrCat("printable ASCII, at most ", kModelNameMax, " characters"));
  }
  if (const auto listen = rpc::ParseListenAddress(options->listen); !listen.ok()) {
    return Bad("listen", options->listen, "host:port or unix:PATH");
  }
  if (!options->metrics_listen.empty() && !ParseHostPort(options->metrics_listen).ok()) {
    return Bad("metrics_listen", options->metrics_listen, "host:port, or nothing");
  }
  RETURN_IF_ERROR(CompletePlace(options));
  if (options->threads == 0) {
    options->threads = std::max(1, CoreCount() / PlaceOf(*options).ranks_each);
  }
  options->memory.threads = options->threads;
  return OnGpu(*options) ? execution::CheckGpuBuild() : absl::OkStatus();
}

std::vector<std::string> ToArguments(const WorkerOptions& options) {
  std::vector<std::string> words = {
      absl::StrCat("--model=", options.model),
      absl::StrCat("--model-name=", options.model_name),
      absl::StrCat("--tp=", options.tp),
      absl::StrCat("--device=", options.device),
      absl::StrCat("--threads=", options.threads),
      absl::StrCat("--numerics=", NumericsWord(options.memory.numerics)),
      absl::StrCat("--head=", HeadWord(options.memory.head)),
      absl::StrCat("--max-sequences=", options.memory.max_slots),
      absl::StrCat("--max-step-tokens=", options.memory.max_step_tokens),
      absl::StrCat("--context=", options.memory.max_context),
      absl::StrCat("--memory=", options.memory.memory_bytes),
      absl::StrCat("--memory-fraction=", options.memory_fraction),
      absl::StrCat("--fusion=", options.fusion ? "on" : "off"),
      absl::StrCat("--activations=", execution::ActivationsWord(options.activations)),
      absl::StrCat("--kv-blocks=", options.memory.kv_blocks),
      absl::StrCat("--listen=", options.listen),
      absl::StrCat("--queue-size=", options.queue_size),
      absl::StrCat("--prefix-cache=", options.prefix_cache ? "on" : "off"),
      absl::StrCat("--step-deadline=", FormatDuration(options.step_deadline)),
      absl::StrCat("--drain-timeout=", FormatDuration(options.drain_timeout)),
      absl::StrCat("--log-level=", options.log_level),
      absl::StrCat("--log-format=", options.log_format),
  };
  if (options.group_size > 1) {
    words.push_back(absl::StrCat("--group-size=", options.group_size));
    words.push_back(absl::StrCat("--group-index=", options.group_index));
    words.push_back("--group-leader=" + options.group_leader);
    words.push_back(absl::StrCat("--join-timeout=", FormatDuration(options.join_timeout)));
  }
  for (const auto& [flag, file] : {std::pair{"--tls-cert=", &options.tls.certificate},
                                   std::pair{"--tls-key=", &options.tls.key},
                                   std::pair{"--tls-client-ca=", &options.tls.ca}}) {
    if (!file->empty()) words.push_back(flag + *file);
  }
  return words;
}

uint64_t ConfigHash(const WorkerOptions& options) {
  return Fnv1a(absl::StrCat(options.tp, " ", options.group_size, " ", options.device, " ",
                            NumericsWord(options.memory.numerics), " ",
                            HeadWord(options.memory.head), " ", options.memory.max_slots, " ",
                            options.memory.max_step_tokens, " ", options.memory.max_context, " ",
                            options.memory.memory_bytes, " ", options.memory.kv_blocks, " ",
                            options.fusion, " ", execution::ActivationsWord(options.activations)));
}

}  // namespace nibble::worker
