// What `nibble serve` can be told, and the command lines of the two programs that it starts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "base/clock.h"
#include "base/config.h"
#include "base/tls_files.h"
#include "worker/execution/cuda/activations.h"
#include "worker/weights/memory_plan.h"

namespace nibble::cli {

// What only GPUs have.
struct GpuChoice {
  double memory_fraction = 0.9;  // of the free memory, where memory is 0
  bool fusion = true;
  execution::Activations activations = execution::Activations::kAuto;
};

struct ServeOptions {
  std::string model;  // folder
  std::string model_name;
  int32_t tp = 1;
  std::string device = "cpu";
  std::string host = "127.0.0.1";
  int32_t port = 50051;
  std::string metrics_listen = "127.0.0.1:9100";
  std::string worker_metrics_listen = "127.0.0.1:9110";
  bool metrics_vllm_names = false;
  std::string admin_listen;
  std::string announce;
  TlsFiles tls;           // of the gateway's gRPC ports
  std::string keys_file;  // of the gateway

  int32_t threads = 0;  // of one rank; 0 = this machine's cores over the ranks
  weights::MemoryOptions memory;
  GpuChoice gpu;
  int32_t queue_size = 128;
  bool prefix_cache = true;

  std::string sampling_defaults = "model";
  Duration step_deadline = std::chrono::seconds(10);
  Duration drain_timeout = std::chrono::seconds(60);
  Duration start_timeout = std::chrono::minutes(30);
  std::string log_level = "info";
  std::string log_format = "text";
};

void DeclareServeOptions(ConfigParser* parser, ServeOptions* options);
// Memory and numerics alone: `nibble plan` has the same.
void DeclareMemoryOptions(ConfigParser* parser, weights::MemoryOptions* options);

// device and what only GPUs have: `nibble plan` and `nibble bench` have the same.
void DeclareDevice(ConfigParser* parser, std::string* device, GpuChoice* gpu);
// OK for the CPU, and in a build with GPU support.
[[nodiscard]] absl::Status CheckDevice(const std::string& device);

void DeclareNumerics(ConfigParser* parser, weights::Numerics* numerics, weights::HeadFormat* head);

// Compute threads of one of `tp` ranks on this machine: as given, or a fair share of the cores that
// this process may use (each has buffers of its own, so a plan needs the number).
[[nodiscard]] int32_t RankThreads(int32_t given, int32_t tp);

// What a range cannot say. INVALID_ARGUMENT names key, value and what is allowed.
[[nodiscard]] absl::Status CheckServeOptions(const ServeOptions& options);

// Where the programs of one `nibble serve` meet; all inside one private folder.
struct ServePaths {
  std::string programs;  // folder of nibble-worker and nibble-gateway
  std::string scratch;

  [[nodiscard]] std::string worker_socket() const { return "unix:" + scratch + "/worker.sock"; }
  [[nodiscard]] std::string worker_announce() const { return scratch + "/worker.json"; }
  [[nodiscard]] std::string gateway_announce() const { return scratch + "/gateway.json"; }
};

[[nodiscard]] std::vector<std::string> WorkerCommandLine(const ServeOptions& options,
                                                         const ServePaths& paths);
[[nodiscard]] std::vector<std::string> GatewayCommandLine(const ServeOptions& options,
                                                          const ServePaths& paths);

}  // namespace nibble::cli
