// The leader of a group: the engine on its thread and the gRPC server in front of it.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/engine/engine.h"
#include "worker/rpc/worker_server.h"
#include "worker/step/executor.h"
#include "worker/step/group_stats.h"
#include "worker/step/plan_channel.h"

namespace nibble::rpc {

struct LeaderOptions {
  engine::EngineOptions engine;
  // Borrowed; outlive the leader.
  step::Executor* executor = nullptr;
  step::PlanPublisher* publisher = nullptr;  // nullptr: a group of one rank
  const Clock* clock = nullptr;
  step::EngineStats* stats = nullptr;
  // Its engine, clock and stats are filled in from above.
  WorkerServerOptions server;
};

// One thread makes, asks and destroys it.
class Leader {
 public:
  // The port is open when this returns. INVALID_ARGUMENT: the address cannot be listened on.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<Leader>> Start(LeaderOptions options);
  ~Leader();  // as Stop(zero)
  Leader(const Leader&) = delete;
  Leader& operator=(const Leader&) = delete;

  [[nodiscard]] const std::string& address() const { return server_->address(); }

  // Takes nothing new; what there is goes on.
  void Drain() { server_->Drain(); }
  // Nothing runs or waits, and every stream has ended.
  [[nodiscard]] bool idle() const;

  // The engine's loop is over, of itself (a fault) or by Stop().
  [[nodiscard]] bool ended() const { return ended_.load(std::memory_order_acquire); }
  // Readable from then on.
  [[nodiscard]] int ended_fd() const { return ended_fd_; }

  // Ends what still runs or waits (UNAVAILABLE) and closes the port; the streams' last messages
  // get `grace` to leave. Returns what the engine's loop returned. The first call counts.
  [[nodiscard]] absl::Status Stop(Duration grace);

 private:
  explicit Leader(const Clock* clock);
  void StartEngineThread();

  const Clock* const clock_;
  int ended_fd_ = -1;
  std::unique_ptr<engine::Engine> engine_;
  std::atomic<bool> ended_{false};
  absl::Status engine_status_;  // valid once the thread is joined
  std::thread engine_thread_;
  std::unique_ptr<WorkerServer> server_;
};

}  // namespace nibble::rpc
