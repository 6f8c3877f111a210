// Runs steps on a GPU: one rank's shard of the model, its KV blocks and its sampler.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/execution/cuda/cuda_model.h"
#include "worker/execution/cuda/gpu_group.h"
#include "worker/execution/cuda/gpu_rank.h"
#include "worker/step/executor.h"

namespace nibble::execution {

struct CudaExecutorOptions {
  int32_t max_slots = 64;
  int32_t max_step_tokens = 2048;
  int32_t kv_blocks = 0;    // at least one sequence of the model's max_context
  bool fusion = true;       // false: a kernel per operation, no graphs
  bool graphs = true;       // with fusion: decode steps as graphs
  bool one_machine = true;  // all ranks are on it: they may write into each other's memory
  // Of every rank, where several hold parts of the model.
  std::vector<weights::Range> vocab_shares = {};
  std::function<void(int64_t bytes)> on_exchanged_bytes = {};  // of each step; may be empty
};

// Bytes of device memory, by owner.
struct DeviceMemoryUse {
  int64_t weights = 0;
  int64_t kv_cache = 0;
  int64_t activations = 0;  // of the decoder, with its scratch
  int64_t workspace = 0;    // inputs and outputs of steps
};

// Launch puts a step's copies and kernels on a stream and returns. A step of one token a sequence
// runs as a graph; rows that ask for more than their best token are sampled by a kernel behind it.
// Where masks come late, that kernel and the step behind go onto the stream when they are there.
class CudaExecutor final : public step::Executor {
 public:
  // The device of the calling thread; Launch and Wait must come from a thread with the same one.
  // `group`: with several ranks only.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<CudaExecutor>> Create(
      std::unique_ptr<CudaModel> model, const CudaExecutorOptions& options,
      std::unique_ptr<GpuGroup> group = nullptr);
  ~CudaExecutor() override;

  // What Create will allocate, for a model of CudaModel::Plan; needs no device.
  [[nodiscard]] static absl::StatusOr<DeviceMemoryUse> Plan(std::unique_ptr<CudaModel> planned,
                                                            const CudaExecutorOptions& options);

  [[nodiscard]] absl::Status Launch(const step::StepPlan& plan) override;
  [[nodiscard]] absl::Status ProvideMasks(const step::MaskBatch& masks) override;
  [[nodiscard]] absl::Status Wait(Deadline deadline, step::StepResult* result) override;
  [[nodiscard]] const step::ExecutorLimits& limits() const override;

  [[nodiscard]] DeviceMemoryUse memory_use() const;

  // GpuExecutor::time_operations. REQUIRES: no step in flight.
  [[nodiscard]] absl::StatusOr<std::vector<OperationTime>> TimeOperations(
      int32_t tokens, bool decode, const std::function<absl::Status()>& steps);

  // Any thread: waits for peers end, on the device too.
  void Abort();

  // Called with the logits of each sampled row, before penalties. For tests and perplexity.
  using LogitsObserver =
      std::function<void(int32_t slot, int32_t position, std::span<const float> logits)>;
  void set_logits_observer(LogitsObserver observer);  // REQUIRES: no step in flight

 private:
  struct State;
  explicit CudaExecutor(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace nibble::execution
