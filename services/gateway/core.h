// What all calls of one gateway share.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "nibble/worker/v1/worker.grpc.pb.h"
#include "services/gateway/admission.h"
#include "services/gateway/callers.h"
#include "services/gateway/limits.h"
#include "services/gateway/live_calls.h"
#include "services/gateway/metrics.h"
#include "services/gateway/randomness.h"
#include "services/gateway/retry_budget.h"
#include "services/gateway/router.h"
#include "services/gateway/work_pool.h"

namespace nibble::gateway {

// Owned by GatewayServer, which outlives every call. Each member is thread-safe by itself.
struct Core {
  Core(const Limits& the_limits, const std::vector<std::string>& addresses,
       const RouterOptions& router_options, const Clock* the_clock)
      : limits(the_limits),
        clock(the_clock),
        admission(the_limits),
        router(addresses, router_options, the_clock),
        metrics(GroupNames(router)),
        calls(static_cast<size_t>(the_limits.max_concurrency)),
        pool({.threads = 2,
              .queue_tasks = the_limits.tokenize_queue,
              .queue_bytes = the_limits.tokenize_queue_bytes}) {}

  // How long a client is asked to wait before it comes back: jittered, so that they do not all.
  [[nodiscard]] Duration RetryDelay() {
    return random.Between(std::chrono::milliseconds(500), std::chrono::milliseconds(2000));
  }

  const Limits limits;
  const Clock* const clock;
  const Admission admission;
  Router router;
  GatewayMetrics metrics;
  LiveCalls calls;
  LiveCount upstreams;
  RetryBudget retry_budget;
  Randomness random;
  std::function<std::string()> today;  // "2025-01-31T12:34:56", for chat templates
  std::vector<std::unique_ptr<worker::v1::WorkerService::Stub>> workers;  // by group
  std::unique_ptr<Callers> callers;  // null: anybody may call, and nobody is a tenant
  std::atomic<bool> draining{false};
  WorkPool pool;  // last: its tasks use the others

 private:
  [[nodiscard]] static std::vector<std::string> GroupNames(const Router& router) {
    std::vector<std::string> names;
    for (size_t i = 0; i < router.group_count(); ++i) names.push_back(router.group_name(i));
    return names;
  }
};

}  // namespace nibble::gateway
