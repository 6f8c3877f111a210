#include "services/gateway/upstream_call.h"

#include <utility>

#include "base/check.h"
#include "base/grpc_status.h"

namespace nibble::gateway {

UpstreamCall::UpstreamCall(std::shared_ptr<UpstreamOwner> owner, LiveCount* count,
                           const Place& place)
    : owner_(std::move(owner)), count_(count), place_(place) {
  count_->Enter();
}

void UpstreamCall::Start(worker::v1::WorkerService::Stub* stub,
                         const worker::v1::GenerateRequest& request, Duration left) {
  if (left != Duration::max()) {
    context_.set_deadline(gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                                       gpr_time_from_nanos(left.count(), GPR_TIMESPAN)));
  }
  stub->async()->Generate(&context_, &request, this);
  AddHold();  // reads also start outside of gRPC's callbacks, after a pause
  StartRead(&response_);
  StartCall();
}

void UpstreamCall::Read() {
  CHECK(!let_go_);
  paused_ = false;
  StartRead(&response_);
}

void UpstreamCall::LetGo() {
  if (std::exchange(let_go_, true)) return;
  RemoveHold();
}

void UpstreamCall::OnDone(const grpc::Status& status) {
  owner_->OnUpstreamDone(this, FromGrpcStatus(status));
  LiveCount* const count = count_;
  delete this;  // and with it perhaps the owner
  count->Leave();
}

}  // namespace nibble::gateway
