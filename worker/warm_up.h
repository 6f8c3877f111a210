// The first steps of a group, before its port opens: a model that cannot make a step is not served,
// and the prefill chunk follows what the machine can do.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/step/executor.h"
#include "worker/step/plan_channel.h"

namespace nibble::worker {

struct WarmUpResult {
  double prefill_tokens_per_second = 0;
  // Prompt tokens of one step that take about WarmUpOptions::chunk_time at that rate: a multiple of
  // 16, at most the executor's limit.
  int32_t prefill_chunk_tokens = 0;
};

struct WarmUpOptions {
  Deadline deadline = Deadline::max();
  Duration chunk_time = std::chrono::seconds(1);
};

// Runs a few steps on slot 0 and leaves it closed. They are counted from 1; the engine, which comes
// after them, counts its own from 1 again.
// `publisher` is nullptr for a group of one rank. DATA_LOSS when the logits are not finite; else
// the executor's or the publisher's errors.
[[nodiscard]] absl::StatusOr<WarmUpResult> WarmUp(step::Executor* executor,
                                                  step::PlanPublisher* publisher,
                                                  const Clock& clock, const WarmUpOptions& options);

}  // namespace nibble::worker
