// The leader's loop: drain the inbox, schedule, publish, launch, wait for the step before, commit,
// deliver. One thread owns all of its state; others send it messages.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/priority.h"
#include "worker/step/executor.h"
#include "worker/step/group_stats.h"
#include "worker/step/plan_channel.h"
#include "worker/step/step_plan.h"

namespace nibble::engine {

// Validated by the caller against the field ranges; the engine checks lengths against its limits.
struct Request {
  std::vector<int32_t> prompt;
  step::SamplingParams sampling;
  uint64_t seed = 0;
  int32_t max_tokens = 0;  // >= 1; output ends with the context (or the KV pool) at the latest
  int32_t min_tokens = 0;
  std::vector<int32_t> stop_ids;
  int32_t logprobs = -1;
  Deadline deadline = Deadline::max();
  Deadline queue_deadline = Deadline::max();  // for admission
  std::string tenant = {};                    // shares the group fairly; empty = nobody
  Priority priority = Priority::kNormal;
  std::string prefix_salt = {};      // shares cached prefixes with those who have the same one
  bool bypass_prefix_cache = false;  // takes no cached prefix, and leaves none
};

enum class FinishReason { kStop, kLength };

struct Finish {
  // OK, or how it ended: CANCELLED, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED (queue timeout),
  // INTERNAL (non-finite logits), UNAVAILABLE (the group ends).
  absl::Status status;
  FinishReason reason = FinishReason::kStop;
  int32_t completion_tokens = 0;
  int32_t cached_prompt_tokens = 0;
  int32_t preemptions = 0;
  Duration queue{}, prefill{}, decode{};
};

struct OutputToken {
  int32_t token_id = 0;
  float logprob = 0;                             // where logprobs were asked for
  std::span<const step::TokenLogprob> top = {};  // valid during the call
};

// Where a request's output goes. Called on the engine thread, in order: OnAdmitted once, OnTokens
// any number of times, OnFinished exactly once, nothing after it. Must not block; a sink that is
// behind coalesces. The engine holds a reference until OnFinished has returned.
class Sink {
 public:
  virtual ~Sink() = default;
  virtual void OnAdmitted(int32_t cached_prompt_tokens) = 0;
  virtual void OnTokens(std::span<const OutputToken> tokens) = 0;
  virtual void OnFinished(const Finish& finish) = 0;
};

struct EngineOptions {
  // Waiting requests; more are RESOURCE_EXHAUSTED. One tenant may have four fifths of it.
  int32_t queue_size = 128;
  int64_t queue_prompt_tokens = 1 << 20;
  int32_t prefill_chunk_tokens = 512;  // of one step, all sequences together
  // Fewer, once steps with prompts were seen to take longer than this; 0 is off. Attention slows
  // down as contexts grow, and a step that is merely long must not look like one that hangs.
  Duration prefill_chunk_time = std::chrono::seconds(1);
  Duration step_deadline = std::chrono::seconds(10);
  double kv_watermark = 0.90;  // no new prefill above this share of used blocks
  bool prefix_cache = true;
  std::string prefix_key = {};      // secret of this process: names of cached blocks follow from it
  std::string model_identity = {};  // and from what computes them
};

struct Load {
  int32_t running = 0, waiting = 0;
  int64_t waiting_prompt_tokens = 0;
  int32_t kv_blocks_used = 0, kv_blocks_total = 0;
  uint64_t steps = 0;
  bool draining = false, ready = false;
};

using RequestId = uint64_t;

class Engine {
 public:
  // Borrowed objects outlive the engine. `publisher` is nullptr for a group of one rank. The engine
  // counts the requests that it rejects itself; `ready` is 1 while Run() is in its loop.
  [[nodiscard]] static std::unique_ptr<Engine> Create(const EngineOptions& options,
                                                      step::Executor* executor,
                                                      step::PlanPublisher* publisher,
                                                      const Clock* clock, step::EngineStats* stats);
  virtual ~Engine() = default;

  // Any thread. INVALID_ARGUMENT (prompt empty, too long for the context or for the KV pool; a
  // token id outside the vocabulary; a count out of range), RESOURCE_EXHAUSTED (queue full),
  // UNAVAILABLE (draining, or the group ends). On success the sink will see OnFinished exactly
  // once.
  [[nodiscard]] virtual absl::StatusOr<RequestId> Submit(Request request,
                                                         std::shared_ptr<Sink> sink) = 0;
  // Any thread, any id, any number of times.
  virtual void Cancel(RequestId id) = 0;
  // Any thread. Stops admission; what is admitted or waiting finishes.
  virtual void Drain() = 0;
  [[nodiscard]] virtual Load GetLoad() const = 0;  // any thread

  // Runs the loop on the calling thread until Stop() (OK) or a fault of the group (its status);
  // before it returns every request has had OnFinished. On Stop() steps in flight are waited for
  // and the publisher is stopped.
  [[nodiscard]] virtual absl::Status Run() = 0;
  virtual void Stop() = 0;  // any thread

  // One turn of the loop, for simulations in virtual time: never blocks on the inbox. True when
  // there was anything to do. REQUIRES: Run() is not in use.
  [[nodiscard]] virtual absl::StatusOr<bool> RunStep() = 0;
};

}  // namespace nibble::engine
