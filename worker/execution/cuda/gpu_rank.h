// A rank's GPU as programs see it: opened, planned, filled. No CUDA header stands here; in a build
// without CUDA (NIBBLE_CUDA off) every function refuses with UNIMPLEMENTED.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/collectives/communicator.h"
#include "worker/execution/cuda/activations.h"
#include "worker/model/model_spec.h"
#include "worker/step/executor.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/memory_plan.h"

namespace nibble::execution {

// OK in a build with CUDA.
[[nodiscard]] absl::Status CheckGpuBuild();

struct GpuInfo {
  int32_t ordinal = 0;
  std::string name;                // "NVIDIA H200"
  std::string compute_capability;  // "9.0"
  std::string driver;              // CUDA version of the driver, "13.0"
  int32_t multiprocessors = 0;
  int64_t total_bytes = 0;
  int64_t free_bytes = 0;  // with this process's context already taken
};

// Makes this process's context on GPU `ordinal`, the calling thread's device from then on.
// FAILED_PRECONDITION in one line: no driver, no such GPU, an architecture that this build has no
// kernels for, a GPU that another process holds for itself.
[[nodiscard]] absl::StatusOr<GpuInfo> OpenGpu(int32_t ordinal);

// Bytes a second that one kernel reads of at most 4 GiB that are free. REQUIRES: OpenGpu was
// called.
[[nodiscard]] absl::StatusOr<double> GpuReadBandwidth(const GpuInfo& gpu);

// Where weights come from.
struct GpuModelSource {
  const weights::Checkpoint* checkpoint = nullptr;  // nullptr: random ones, of the two below
  model::ModelSpec spec = {};
  int32_t group = 128;

  [[nodiscard]] const model::ModelSpec& shape() const {
    return checkpoint != nullptr ? checkpoint->spec() : spec;
  }
};

struct GpuPlanOptions {
  weights::MemoryOptions memory;  // numerics, head and threads mean nothing here
  bool fusion = true;
  const GpuInfo* gpu = nullptr;  // nullptr: not known; as if there were memory enough
  double memory_fraction = 0.9;  // of what is free, where memory.memory_bytes is 0
  bool one_machine = true;       // all ranks are on it
};

// Exact from headers for nibble's own allocations (activations: the decoder's with its scratch;
// workspace: steps' inputs and outputs, exchange buffers, the block that serves padding); graphs
// and what libraries take come from a table of measurements. KV blocks: memory.kv_blocks, or what
// the budget leaves, at most what max_slots sequences can use. Errors as weights::PlanMemory.
[[nodiscard]] absl::StatusOr<weights::MemoryPlan> PlanGpuMemory(const GpuModelSource& source,
                                                                int32_t rank_count,
                                                                const GpuPlanOptions& options);

struct GpuExecutorOptions {
  int32_t rank = 0;
  bool fusion = true;
  Activations activations = Activations::kAuto;
  // Of the whole group, which exchanges through it what GPUs need to find each other; with several
  // ranks only. Borrowed, until the executor is made.
  collectives::Communicator* communicator = nullptr;
  // In the place of peers an echo of this rank (GpuGroup::Echo); only ever to time its share.
  bool echo = false;
  bool one_machine = true;                            // all ranks are on this one
  Duration peer_patience = std::chrono::seconds(60);  // for a peer, at start and in a step
  // Of each step, as it is launched: what this rank gives to sums and gathers.
  std::function<void(int64_t bytes)> on_exchanged_bytes = {};
  std::function<void(int64_t bytes_done, int64_t bytes_total)> progress = {};
};

// Bytes of device memory by owner.
struct GpuMemoryUse {
  int64_t weights = 0;
  int64_t kv_cache = 0;
  int64_t activations = 0;
  int64_t workspace = 0;
  int64_t graphs = 0;  // graphs, kernels' code, libraries: all that the driver took beside the rest
  int64_t context = 0;  // what was taken when the GPU had been opened, by whomever
};

// One kind of operation of a step, alone on the device.
struct OperationTime {
  std::string name = {};
  int32_t calls = 0;        // in a step
  double microseconds = 0;  // of all of them, the median over steps
  int64_t bytes = 0;        // that they must read at least
  int64_t flops = 0;
};

struct GpuExecutor {
  std::unique_ptr<step::Executor> executor;
  GpuMemoryUse memory;
  // Of the steps that `steps` launches and waits for, those that decode (or do not) and have
  // `tokens` tokens: their operations one by one, without graphs. The executor's thread.
  std::function<absl::StatusOr<std::vector<OperationTime>>(
      int32_t tokens, bool decode, const std::function<absl::Status()>& steps)>
      time_operations;
  std::function<void()> abort;  // any thread: waits for peers end; while the executor lives
};

// REQUIRES: `gpu` was opened on this thread, `plan` is PlanGpuMemory's with the group's kv_blocks.
// RESOURCE_EXHAUSTED when the device has less memory than planned.
[[nodiscard]] absl::StatusOr<GpuExecutor> CreateGpuExecutor(const GpuInfo& gpu,
                                                            const GpuModelSource& source,
                                                            const weights::MemoryPlan& plan,
                                                            const GpuExecutorOptions& options);

}  // namespace nibble::execution
