// The side of every machine but the first in a group over several machines.
#pragma once

#include <grpcpp/security/credentials.h>

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/group/group_control.h"
#include "worker/group/machine_link.h"
#include "worker/step/group_stats.h"
#include "worker/step/plan_channel.h"

namespace nibble::group {

struct GroupMemberOptions {
  std::string leader;  // host:port of the first machine
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  MachinePlace place;
  RankFacts facts;
  // Borrowed. The other machines' ranks, the leader's address and the rendezvous are written here.
  GroupControl* control = nullptr;
  step::GroupStats* stats = nullptr;
  const Clock* clock = nullptr;
  step::PlanPublisher* plans = nullptr;  // gets the leader's records; the ring of this machine
  Duration join_timeout = std::chrono::minutes(10);
  Duration silence_max = std::chrono::seconds(3);
  // Asked several times a second while the first machine cannot be reached.
  std::function<bool()> give_up = [] { return false; };
};

// Tries until the first machine answers. FAILED_PRECONDITION or INVALID_ARGUMENT: it refuses this
// one, and says why; UNAVAILABLE: it was not reached in time; CANCELLED: give_up().
[[nodiscard]] absl::StatusOr<std::unique_ptr<MachineLink>> JoinGroup(GroupMemberOptions options);

}  // namespace nibble::group
