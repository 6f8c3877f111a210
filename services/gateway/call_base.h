// What every RPC of the public port does first and last: its place among the calls in flight, its
// deadline, its metrics, its status and trailers.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "services/gateway/client_sink.h"
#include "services/gateway/core.h"
#include "services/gateway/live_calls.h"

namespace nibble::gateway {

// Who calls, by the key that the call shows; null where no keys are asked for. UNAUTHENTICATED
// where it shows none, several, or an unknown one.
[[nodiscard]] absl::StatusOr<std::shared_ptr<const Caller>> FindCaller(
    const Core& core, const grpc::CallbackServerContext& context);

// Base of every reactor; one per call.
class CallBase : public LiveCall {
 public:
  CallBase(Core* core, Rpc rpc, grpc::CallbackServerContext* context);

 protected:
  // Finds out who calls and takes the call's places. UNAUTHENTICATED where keys are asked for and
  // none is shown that is known, UNAVAILABLE while draining, RESOURCE_EXHAUSTED at a limit of
  // calls or of metadata, DEADLINE_EXCEEDED when no time is left: the call is then finished without
  // any work.
  [[nodiscard]] absl::Status Enter();
  // Gives back the place among the calls in flight; from OnDone, which comes behind Close.
  void Leave();
  // Gives back the caller's places, adds trailers, counts; the result goes to Finish. Once.
  [[nodiscard]] grpc::Status Close(const absl::Status& status);
  [[nodiscard]] grpc::Status Close(const GenerationEnd& end);

  [[nodiscard]] Core& core() const { return *core_; }
  // Null where no keys are asked for.
  [[nodiscard]] const std::shared_ptr<const Caller>& caller() const { return caller_; }
  [[nodiscard]] Rpc rpc() const { return rpc_; }
  [[nodiscard]] Deadline arrived() const { return arrived_; }
  [[nodiscard]] Deadline deadline() const { return deadline_; }
  [[nodiscard]] grpc::CallbackServerContext* context() const { return context_; }
  [[nodiscard]] bool DeadlinePassed() const { return core_->clock->Now() >= deadline_; }
  // What the client's leaving means: its deadline where that has passed, else a cancel. gRPC rounds
  // a timeout up by as much as a hundredth when it sends it, so the client's own passes earlier.
  [[nodiscard]] bool LeftAtDeadline() const {
    return deadline_ != Deadline::max() &&
           core_->clock->Now() >= deadline_ - (deadline_ - arrived_) / 100;
  }
  // Ends the call on the wire with this status, before what still waits for a reader: a trailer
  // of ours would wait behind data that is not read.
  void Reset(const absl::Status& status);

 private:
  void AddTrailer(const char* key, const std::string& value);

  Core* const core_;
  const Rpc rpc_;
  grpc::CallbackServerContext* const context_;
  const Deadline arrived_;
  const Deadline deadline_;
  std::shared_ptr<const Caller> caller_;
  bool entered_ = false;
  bool has_places_ = false;  // of the caller's
};

}  // namespace nibble::gateway
