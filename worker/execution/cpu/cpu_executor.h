// Runs steps on the CPU: one rank's shard of the model, its KV blocks and its sampler.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/cpu/kernels.h"
#include "worker/collectives/communicator.h"
#include "worker/step/executor.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/memory_plan.h"
#include "worker/weights/shard.h"

namespace nibble::execution {

struct CpuExecutorOptions {
  weights::MemoryOptions memory;  // numerics, head, slots, step tokens, context, KV blocks
  int32_t threads = 1;            // compute threads of this rank
  cpu::IsaLevel isa = cpu::BestIsaLevel();
  // Called while weights are loaded and packed, from one thread.
  std::function<void(int64_t bytes_done, int64_t bytes_total)> progress = {};
  // Called as layers pass, for the liveness stamp. Must be fast.
  std::function<void()> on_progress_stamp = {};
};

// Bytes actually allocated, by owner (the `kind` label of nibble_memory_bytes).
struct MemoryUse {
  int64_t weights = 0;
  int64_t kv_cache = 0;
  int64_t activations = 0;
  int64_t workspace = 0;
};

// A driver thread and options.threads - 1 helpers live inside; Launch hands the step over.
class CpuExecutor final : public step::Executor {
 public:
  // `communicator` outlives the executor and is used by its driver thread alone after this.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<CpuExecutor>> Create(
      const weights::Checkpoint& checkpoint, const weights::MemoryPlan& plan,
      collectives::Communicator* communicator, CpuExecutorOptions options);
  ~CpuExecutor() override;

  [[nodiscard]] absl::Status Launch(const step::StepPlan& plan) override;
  [[nodiscard]] absl::Status ProvideMasks(const step::MaskBatch& masks) override;
  [[nodiscard]] absl::Status Wait(Deadline deadline, step::StepResult* result) override;
  [[nodiscard]] const step::ExecutorLimits& limits() const override;

  [[nodiscard]] MemoryUse memory_use() const;

  // Called on the driver thread with the whole vocabulary's logits of each sampled row, before
  // penalties. Makes every row gather its logits. For tests, perplexity and calibration.
  using LogitsObserver =
      std::function<void(int32_t slot, int32_t position, std::span<const float> logits)>;
  void set_logits_observer(LogitsObserver observer);  // REQUIRES: no step in flight

 private:
  struct State;
  explicit CpuExecutor(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace nibble::execution
