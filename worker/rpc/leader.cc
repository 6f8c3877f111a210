#include "worker/rpc/leader.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <utility>

#include "base/check.h"
#include "base/status.h"

namespace nibble::rpc {

Leader::Leader(const Clock* clock) : clock_(clock), ended_fd_(::eventfd(0, EFD_CLOEXEC)) {
  CHECK(ended_fd_ >= 0);
}

absl::StatusOr<std::unique_ptr<Leader>> Leader::Start(LeaderOptions options) {
  std::unique_ptr<Leader> leader(new Leader(options.clock));
  leader->engine_ = engine::Engine::Create(options.engine, options.executor, options.publisher,
                                           options.clock, options.stats);
  leader->StartEngineThread();
  options.server.service.engine = leader->engine_.get();
  options.server.service.clock = options.clock;
  options.server.service.stats = options.stats;
  ASSIGN_OR_RETURN(leader->server_, WorkerServer::Start(std::move(options.server)));
  return leader;
}

void Leader::StartEngineThread() {
  engine_thread_ = std::thread([this] {
    engine_status_ = engine_->Run();
    ended_.store(true, std::memory_order_release);
    const uint64_t one = 1;
    CHECK(::write(ended_fd_, &one, sizeof(one)) == sizeof(one));
  });
}

bool Leader::idle() const {
  const engine::Load load = engine_->GetLoad();
  return load.running + load.waiting == 0 && server_->service().open_streams() == 0;
}

absl::Status Leader::Stop(Duration grace) {
  if (engine_thread_.joinable()) {
    engine_->Stop();
    engine_thread_.join();
    if (server_ != nullptr) server_->Shutdown(clock_->Now() + grace);
  }
  return engine_status_;
}

Leader::~Leader() {
  (void)Stop(Duration::zero());
  server_.reset();  // its streams refer to the engine
  ::close(ended_fd_);
}

}  // namespace nibble::rpc
