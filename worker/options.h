// What nibble-worker can be told.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/clock.h"
#include "base/config.h"
#include "base/tls_files.h"
#include "worker/execution/cuda/activations.h"
#include "worker/group/machine_link.h"
#include "worker/weights/memory_plan.h"

namespace nibble::worker {

inline constexpr uint16_t kGroupPort = 50053;  // where the machines of a group meet

struct WorkerOptions {
  std::string model;       // folder
  std::string model_name;  // empty = the folder's
  int32_t tp = 1;          // ranks of the whole group
  // Groups over several machines. Every machine has tp / group_size ranks.
  int32_t group_size = 0;    // machines; 0 = not said, CompleteOptions() makes it 1
  int32_t group_index = -1;  // this one; -1 = not said, 0 = the first, with the leader
  std::string group_leader;  // host[:port] of the first machine, as the others reach it
  Duration join_timeout = std::chrono::minutes(10);
  std::string device = "cpu";
  int32_t threads = 0;  // of one rank; 0 = this machine's cores over the ranks
  weights::MemoryOptions memory;
  double memory_fraction = 0.9;  // GPUs: of the free memory, where memory.memory_bytes is 0
  bool fusion = true;            // GPUs
  execution::Activations activations = execution::Activations::kAuto;  // GPUs
  std::string listen = "127.0.0.1:50052";
  TlsFiles tls;  // of the leader's port; its CA signs gateways
  std::string metrics_listen = "127.0.0.1:9100";
  bool metrics_vllm_names = false;
  std::string announce;
  int32_t queue_size = 128;
  bool prefix_cache = true;
  Duration step_deadline = std::chrono::seconds(10);
  Duration drain_timeout = std::chrono::seconds(60);
  std::string log_level = "info";
  std::string log_format = "text";
  std::string termination_log;
};

void DeclareOptions(ConfigParser* parser, WorkerOptions* options);

// Takes what was not said from the variables that a LeaderWorkerSet sets in its pods:
// LWS_LEADER_ADDRESS, LWS_GROUP_SIZE, LWS_WORKER_INDEX. INVALID_ARGUMENT where one is no number.
[[nodiscard]] absl::Status TakeLeaderWorkerSet(const ConfigParser::GetEnv& env,
                                               WorkerOptions* options);

// What a range cannot say; fills in what is derived (model_name, threads). INVALID_ARGUMENT names
// key, value and what is allowed.
[[nodiscard]] absl::Status CompleteOptions(WorkerOptions* options);

// Which part of the group this machine is. REQUIRES: CompleteOptions().
[[nodiscard]] group::MachinePlace PlaceOf(const WorkerOptions& options);

// The command line that the supervisor starts its ranks with: all of it but the metrics port and
// the announcement, which are its own. No value in it is empty.
[[nodiscard]] std::vector<std::string> ToArguments(const WorkerOptions& options);

// Of everything that decides what a step computes. The ranks of a group must agree.
[[nodiscard]] uint64_t ConfigHash(const WorkerOptions& options);

[[nodiscard]] inline bool OnGpu(const WorkerOptions& options) { return options.device == "cuda"; }
[[nodiscard]] const char* NumericsWord(weights::Numerics numerics);
[[nodiscard]] const char* HeadWord(weights::HeadFormat head);

}  // namespace nibble::worker
