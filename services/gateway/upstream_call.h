// One stream to a worker group: one choice of one attempt.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "base/clock.h"
#include "nibble/worker/v1/worker.grpc.pb.h"
#include "services/gateway/live_calls.h"

namespace nibble::gateway {

class UpstreamCall;

// Who reads the stream. Called on gRPC's threads; both may use the call's methods.
class UpstreamOwner {
 public:
  virtual ~UpstreamOwner() = default;
  // A read ended. Where !ok there is nothing more to read and OnUpstreamDone follows.
  virtual void OnUpstreamRead(UpstreamCall* call, bool ok) = 0;
  // The last call about this stream; it is gone when this returns.
  virtual void OnUpstreamDone(UpstreamCall* call, const absl::Status& status) = 0;
};

// Owns itself: lives from Start until OnUpstreamDone has returned. Between the two, Read, Cancel
// and LetGo are called under a lock of the owner's.
class UpstreamCall final : public grpc::ClientReadReactor<worker::v1::GenerateResponse> {
 public:
  struct Place {
    size_t group;
    int attempt;
    uint32_t choice;
  };

  // Keeps `owner` alive until it is done, since gRPC calls back after everyone else has left.
  UpstreamCall(std::shared_ptr<UpstreamOwner> owner, LiveCount* count, const Place& place);

  // Sends the request and begins to read. `left` is the deadline's rest; max() = none.
  void Start(worker::v1::WorkerService::Stub* stub, const worker::v1::GenerateRequest& request,
             Duration left);
  // Reads one more message. REQUIRES: no read is under way, LetGo was not called.
  void Read();
  void Cancel() { context_.TryCancel(); }
  // There will be no more Read. Idempotent.
  void LetGo();

  [[nodiscard]] const Place& place() const { return place_; }
  [[nodiscard]] const worker::v1::GenerateResponse& response() const { return response_; }
  [[nodiscard]] bool paused() const { return paused_; }
  void Pause() { paused_ = true; }

 private:
  void OnReadDone(bool ok) override { owner_->OnUpstreamRead(this, ok); }
  void OnDone(const grpc::Status& status) override;

  std::shared_ptr<UpstreamOwner> owner_;
  LiveCount* const count_;
  const Place place_;
  grpc::ClientContext context_;
  worker::v1::GenerateResponse response_;
  bool paused_ = false;  // a message was taken and no read started
  bool let_go_ = false;
};

}  // namespace nibble::gateway
