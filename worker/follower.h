// What a rank other than the leader does: replays the leader's plans.
#pragma once

#include <functional>

#include "absl/status/status.h"
#include "base/clock.h"
#include "worker/step/executor.h"
#include "worker/step/group_stats.h"
#include "worker/step/plan_channel.h"

namespace nibble::worker {

struct FollowerOptions {
  Duration step_deadline = std::chrono::seconds(10);
  // Until this is true the group warms up: its first steps touch all memory for the first time.
  std::function<bool()> serving = [] { return true; };
  Duration warm_up_deadline = std::chrono::minutes(2);
  // How often a follower without work shows that it lives.
  Duration idle_stamp = std::chrono::milliseconds(500);
  const Clock* clock = nullptr;  // borrowed, as the two below
  step::RankStats* stats = nullptr;
};

// Runs one step ahead, like the leader: launches a step, then waits for the one before. OK when the
// leader says stop; else the channel's or the executor's error.
[[nodiscard]] absl::Status RunFollower(step::PlanReceiver* receiver, step::Executor* executor,
                                       const FollowerOptions& options);

}  // namespace nibble::worker
