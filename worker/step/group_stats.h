// Everything a worker group exports, in one block of shared memory: written by the leader's engine
// and by every rank, read by the supervisor that serves /metrics. Names: docs/OPERATIONS.
#pragma once

#include <array>
#include <cstdint>

#include "base/stats.h"
#include "base/tls_stats.h"

namespace nibble::step {

inline constexpr int32_t kMaxRanks = 64;

inline constexpr std::array<double, 15> kStepSecondsBounds = {
    .001, .002, .003, .005, .0075, .01, .015, .02, .03, .05, .075, .1, .2, .5, 1};
inline constexpr std::array<double, 20> kTtftSecondsBounds = {
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160};
inline constexpr std::array<double, 19> kInterTokenSecondsBounds = {
    .002, .004, .006, .008, .01, .015, .02, .025, .03, .04, .05, .075, .1, .15, .2, .3, .5, 1, 2.5};
inline constexpr std::array<double, 19> kRequestSecondsBounds = {
    .05, .1, .2, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800};
inline constexpr std::array<double, 14> kStepTokensBounds = {
    1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};

enum StepKind { kPrefillStep, kDecodeStep, kMixedStep, kStepKinds };
enum RejectReason {
  kQueueFull,
  kQueueTimeout,
  kDrainingReject,
  kTooLong,
  kInvalid,
  kRejectReasons
};

// Written by the engine thread (and the gRPC edge for rejections).
struct EngineStats {
  Gauge requests_running, requests_waiting, waiting_prompt_tokens;
  Gauge kv_blocks_used, kv_blocks_free, kv_blocks_cached, kv_blocks_quarantined, kv_blocks_total;
  Gauge slots_used, steps_in_flight, draining, ready;
  Counter prompt_tokens, generated_tokens, preemptions, nonfinite_rows;
  Counter cached_prompt_tokens, prefix_queried_tokens, prefix_hit_tokens;
  Counter requests_finished_stop, requests_finished_length, requests_cancelled, requests_expired,
      requests_failed;
  std::array<Counter, kRejectReasons> rejected;
  std::array<Counter, kStepKinds> steps;
  std::array<Histogram<kStepSecondsBounds.size()>, kStepKinds> step_seconds;
  Histogram<kStepTokensBounds.size()> step_tokens;
  Histogram<kTtftSecondsBounds.size()> time_to_first_token, queue_seconds;
  Histogram<kInterTokenSecondsBounds.size()> inter_token;
  Histogram<kRequestSecondsBounds.size()> request_seconds;
  Gauge last_step_ns;  // monotonic; liveness: stale with work pending means a hang
};

// Written by one rank.
struct RankStats {
  Gauge up;           // 1 while the rank is in its loop
  Gauge progress_ns;  // monotonic stamp of the last layer
  Gauge steps;
  Gauge weights_bytes, kv_cache_bytes, activations_bytes, workspace_bytes;
  Gauge graphs_bytes, context_bytes;  // GPUs
  Gauge weights_planned_bytes, kv_cache_planned_bytes, activations_planned_bytes,
      workspace_planned_bytes, graphs_planned_bytes;
  Counter collective_bytes;
  Gauge startup_load_ns;
};

struct GroupStats {
  EngineStats engine;
  std::array<RankStats, kMaxRanks> ranks;
  TlsStats listen_tls;    // of the leader's port
  TlsStats machines_tls;  // of the link between machines
};

}  // namespace nibble::step
