// What one seed means: a server's limits, what breaks, and everything that clients do, in virtual
// time. The same seed always gives the same scenario.
#pragma once

#include <cstdint>
#include <vector>

#include "base/clock.h"
#include "worker/engine/engine.h"
#include "worker/step/executor.h"

namespace nibble::sim {

// When a client cancels its request.
enum class CancelWhen {
  kNever,
  kAfterDelay,  // counted from its submission
  kOnAdmitted,  // from inside the callback
  kOnToken,     // from inside the callback of token number cancel_token
  kOnFinished,  // too late, from inside the callback
  kRightAway,   // before the engine has seen the request
};

struct ClientRequest {
  Deadline arrival{};
  engine::Request request;          // its deadlines count from zero; made absolute at arrival
  Duration deadline_after{};        // 0: none
  Duration queue_deadline_after{};  // 0: none
  CancelWhen cancel = CancelWhen::kNever;
  Duration cancel_after{};
  size_t cancel_token = 0;
};

struct Scenario {
  uint64_t seed = 0;
  step::ExecutorLimits limits;
  engine::EngineOptions engine;
  Duration step_base{};
  Duration step_per_token{};
  std::vector<ClientRequest> clients;  // by arrival
  Deadline drain_at = Deadline::max();
  uint64_t launch_error_at = 0;  // step ids; 0: never
  uint64_t wait_error_at = 0;
  uint64_t hang_at = 0;
  int32_t non_finite_one_in = 0;  // rows; 0: never
};

[[nodiscard]] Scenario MakeScenario(uint64_t seed);

}  // namespace nibble::sim
