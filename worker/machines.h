// How a machine's supervisor comes together with the other machines of its group.
#pragma once

#include <memory>

#include "base/clock.h"
#include "base/tls_source.h"
#include "worker/collectives/store.h"
#include "worker/group/group_control.h"
#include "worker/group/machine_link.h"
#include "worker/options.h"
#include "worker/planned_model.h"
#include "worker/step/group_stats.h"
#include "worker/step/plan_channel.h"

namespace nibble::worker {

// What a group of several machines needs beside its ranks. All empty where there is one machine.
struct Machines {
  std::unique_ptr<TlsSource> tls;                   // where the leader's port has TLS
  std::unique_ptr<collectives::StoreServer> store;  // the first machine's: ranks meet there
  std::unique_ptr<step::PlanPublisher> plans;       // the others': into this machine's ring
  std::unique_ptr<group::MachineLink> link;
};

struct MachinesContext {
  // Borrowed; outlive Machines.
  group::GroupControl* control = nullptr;
  step::GroupStats* stats = nullptr;
  const Clock* clock = nullptr;
  int ring_fd = -1;
};

// The first machine listens for the others; every other one waits until the first takes it in.
// Fills in control->rendezvous. kExitModel: the machines differ, in one line; kExitConfiguration:
// an address that cannot be had; kExitRankLost: the first machine was not reached in time;
// kExitDrained with a reason: a signal came meanwhile.
[[nodiscard]] Failure ConnectMachines(const WorkerOptions& options, const group::RankFacts& facts,
                                      const MachinesContext& context, Machines* machines);

}  // namespace nibble::worker
