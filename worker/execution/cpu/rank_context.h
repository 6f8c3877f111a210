// What the fused modules of one rank share. Everything is borrowed from the executor.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "base/clock.h"
#include "kernels/cpu/kernels.h"
#include "worker/collectives/communicator.h"
#include "worker/execution/cpu/buffers.h"
#include "worker/execution/cpu/matrix_input.h"
#include "worker/execution/cpu/model_shard.h"
#include "worker/execution/cpu/slots.h"
#include "worker/execution/cpu/thread_team.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

struct RankContext {
  const cpu::Kernels* kernels = nullptr;
  const ModelShard* model = nullptr;
  collectives::Communicator* communicator = nullptr;
  ThreadTeam* team = nullptr;
  Buffers* buffers = nullptr;
  const InputConverter* converter = nullptr;
  SlotTable* slots = nullptr;
  std::vector<cpu::KvCache> kv_caches;  // per layer

  // Of the step that runs. Written by thread 0 before the threads start, or between two barriers.
  const step::StepPlan* plan = nullptr;
  StepRows rows;
  absl::Status status;  // what ended the step early
  int64_t collective_ns = 0;

  [[nodiscard]] int32_t tokens() const { return static_cast<int32_t>(rows.inputs.size()); }

  // Runs a collective on thread 0 while the others wait at a barrier on both sides; called by
  // every thread. False, on every thread, when it failed: the step ends.
  template <typename Call>
  [[nodiscard]] bool Collect(int32_t thread, const Call& call) {
    team->Barrier(thread);
    if (thread == 0) {
      const auto begin = std::chrono::steady_clock::now();
      status = call();
      collective_ns += (std::chrono::steady_clock::now() - begin).count();
    }
    team->Barrier(thread);
    return status.ok();
  }
};

// Sums `projected` over the ranks into the residual stream, norms it with `norm_weight` and makes
// it ready for `next`. Called by every thread.
[[nodiscard]] bool ReduceAndNorm(RankContext* context, int32_t thread, const float* norm_weight,
                                 InputForm next, MatrixInput* input);

// The same without a norm: only the residual stream, ready on every thread.
[[nodiscard]] bool ReduceIntoResidual(RankContext* context, int32_t thread);

// Norms the residual stream as it stands after the embedding. Called by every thread.
void NormResidual(RankContext* context, int32_t thread, const float* norm_weight, InputForm next,
                  MatrixInput* input);

// Dense rows of a buffer.
[[nodiscard]] inline cpu::FloatRows Rows(const float* values, int32_t tokens, int32_t columns) {
  return {.tokens = tokens, .columns = columns, .values = values, .stride = columns};
}

}  // namespace nibble::execution
