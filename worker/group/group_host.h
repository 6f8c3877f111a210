// The first machine's side of a group over several machines: the others join here, get the
// leader's plans and are watched.
#pragma once

#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/group/group_control.h"
#include "worker/group/machine_link.h"
#include "worker/step/group_stats.h"
#include "worker/step/plan_channel.h"

namespace nibble::group {

struct GroupHostOptions {
  std::string listen;  // host:port; port 0 = any free one
  std::shared_ptr<grpc::ServerCredentials> credentials = grpc::InsecureServerCredentials();
  MachinePlace place;
  RankFacts facts;
  // Sent to who joins; control->rendezvous has the rest.
  GroupControl* control = nullptr;    // borrowed, as the two below
  step::GroupStats* stats = nullptr;  // the other machines' ranks are written here
  const Clock* clock = nullptr;
  // Of the leader's ring, one per other machine.
  std::vector<std::unique_ptr<step::PlanReceiver>> plans;
  Duration join_timeout = std::chrono::minutes(10);
  Duration silence_max = std::chrono::seconds(3);
};

// A MachineLink that also says where it listens.
class GroupHost : public MachineLink {
 public:
  // INVALID_ARGUMENT when the address cannot be bound. Strangers cannot end the group: who does not
  // say who it is within seconds, or says what does not fit, is refused and logged.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<GroupHost>> Start(GroupHostOptions options);
  [[nodiscard]] virtual std::string address() const = 0;
};

}  // namespace nibble::group
