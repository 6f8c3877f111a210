// Times decode and prefill of any executor. What every `nibble bench` is made of.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/step/executor.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {

// The median of the runs and the distance between the fastest and the slowest.
struct BenchFigure {
  double value = 0;
  double spread = 0;
};

struct DecodeFigures {
  int32_t batch = 0;
  int32_t depth = 0;                   // prompt tokens before the first that is timed
  BenchFigure tokens_per_second = {};  // of all sequences together
  double forward_ms = 0;               // of one step on the device, the median
  double sample_ms = 0;                // of one step, after the last layer; with the head
  double collective_ms = 0;            // of one step
};
struct PrefillFigures {
  int32_t length = 0;
  BenchFigure tokens_per_second = {};
  BenchFigure first_token_ms = {};  // from launch to the first token, an idle executor
};

// KV blocks of `slots` sequences of `positions` each.
[[nodiscard]] int32_t BenchBlocks(int32_t slots, int32_t positions);

// Slots 0 … batch - 1, each with blocks of its own and a greedy sequence of no meaning. Two steps
// are in flight, as in a server; before each figure a prompt runs untimed. Errors are the
// executor's. One thread.
class Measurement {
 public:
  Measurement(step::Executor* executor, int32_t runs);

  // Prompts of `depth` tokens, then `tokens` steps: batch * tokens over the time from the first
  // token to the last.
  [[nodiscard]] absl::StatusOr<DecodeFigures> Decode(int32_t batch, int32_t depth, int32_t tokens);
  [[nodiscard]] absl::StatusOr<PrefillFigures> Prefill(int32_t length);

 private:
  const step::StepPlan& PromptPlan(int32_t slot, int32_t first_position, int32_t tokens,
                                   bool sample);
  const step::StepPlan& DecodePlan(int32_t slots, int32_t position);
  step::SequenceStep& Add(int32_t slot, int32_t first_position, int32_t tokens);
  [[nodiscard]] absl::Status RunPlan(const step::StepPlan& plan);
  [[nodiscard]] absl::Status RunPrompt(int32_t slot, int32_t length);

  step::Executor* const executor_;
  const int32_t runs_;
  int32_t slot_blocks_ = 0;
  uint64_t step_id_ = 0;
  step::StepPlan plan_;
  step::StepResult result_;
};

}  // namespace nibble::execution
