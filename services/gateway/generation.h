// One generation request from its parsed message to its status: checks, tokenizing, routing, its
// choices' streams from a worker group, one retry before the first token.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "base/clock.h"
#include "services/gateway/admission.h"
#include "services/gateway/choice.h"
#include "services/gateway/client_sink.h"
#include "services/gateway/core.h"
#include "services/gateway/status_contract.h"
#include "services/gateway/upstream_call.h"

namespace nibble::gateway {

// A request's message and the view of it.
struct OwnedInput {
  std::unique_ptr<google::protobuf::Message> message;
  GenerationInput input;
};

struct GenerationOptions {
  Core* core = nullptr;
  ClientSink* sink = nullptr;  // valid until its OnEnd
  Rpc rpc = Rpc::kGenerate;    // for the log line
  bool streaming = false;
  Deadline arrived;
  Deadline deadline = Deadline::max();
};

// Shared: by the client's call, by the task that tokenizes and by every upstream call; the last of
// them frees it. Thread-safe.
class Generation final : public UpstreamOwner, public std::enable_shared_from_this<Generation> {
 public:
  explicit Generation(const GenerationOptions& options) : options_(options), core_(*options.core) {}

  // Once. The sink may be called from here on. `caller` is null where no keys are asked for.
  void Begin(OwnedInput input, std::shared_ptr<const Caller> caller);
  // Instead of Begin: the call was refused before its request was looked at.
  void Refuse(const absl::Status& status);
  // Ends it with `status`. `flush` says whether what waits for the client still goes out.
  // Idempotent.
  void Stop(const absl::Status& status, CancelledBy by, bool flush);
  // The client has taken most of what was waiting: reads from the worker again.
  void Resume();

  void OnUpstreamRead(UpstreamCall* call, bool ok) override;
  void OnUpstreamDone(UpstreamCall* call, const absl::Status& status) override;

 private:
  // One choice of the attempt under way.
  struct Slot {
    std::unique_ptr<Choice> choice;
    UpstreamCall* call = nullptr;  // nullptr once it is done
    std::optional<Deadline> first_token;
    Deadline last_token;
  };

  [[nodiscard]] absl::StatusOr<std::shared_ptr<const ServedModel>> CheckRequest();
  // RESOURCE_EXHAUSTED where every group is known to be full.
  [[nodiscard]] absl::Status CheckRoom(const ServedModel& model) const;
  void Prepare(std::shared_ptr<const ServedModel> model);  // on the tokenizing pool
  [[nodiscard]] absl::StatusOr<AdmittedRequest> EncodeAndAdmit(
      std::shared_ptr<const ServedModel> model);

  // False when there is no group to send it to; nothing has changed then.
  [[nodiscard]] bool StartAttempt(std::optional<size_t> excluded)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void DropCalls() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  [[nodiscard]] bool IsCurrent(const UpstreamCall& call) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void HandleMessage(UpstreamCall* call) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SendStarted() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  [[nodiscard]] absl::StatusOr<Choice::Output> Decode(Choice* choice,
                                                      const worker::v1::GenerateResponse& response)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CountTokens(Slot* slot, int tokens) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Deliver(UpstreamCall* call, Choice::Output output) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void HandleFailure(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // True when a second attempt is under way.
  [[nodiscard]] bool Retry(UpstreamFault fault, bool leaving) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  [[nodiscard]] Duration TimeLeft() const;

  [[nodiscard]] Priority ClassOf() const {
    return caller_ ? caller_->key.priority : Priority::kNormal;
  }
  void LeaveQueue() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void End(absl::Status status, bool abandon = false) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Record(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const GenerationOptions options_;
  Core& core_;
  std::shared_ptr<const Caller> caller_;  // written by Begin
  OwnedInput input_;                      // until it is admitted; written by Begin, then the pool's

  absl::Mutex mutex_;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  std::string request_id_ ABSL_GUARDED_BY(mutex_);
  std::optional<AdmittedRequest> request_ ABSL_GUARDED_BY(mutex_);
  const ModelMetrics* model_metrics_ ABSL_GUARDED_BY(mutex_) = nullptr;
  std::vector<Slot> slots_ ABSL_GUARDED_BY(mutex_);
  int attempt_ ABSL_GUARDED_BY(mutex_) = 0;
  std::optional<size_t> group_ ABSL_GUARDED_BY(mutex_);
  Deadline sent_ ABSL_GUARDED_BY(mutex_);
  bool queued_ ABSL_GUARDED_BY(mutex_) = false;  // counts as waiting for a group's slot
  bool holds_retry_ ABSL_GUARDED_BY(mutex_) = false;
  bool started_ ABSL_GUARDED_BY(mutex_) = false;
  bool committed_ ABSL_GUARDED_BY(mutex_) = false;  // a token has arrived: no retry any more
  uint32_t finished_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  Duration detokenizing_ ABSL_GUARDED_BY(mutex_){};
  FinishLabel finish_label_ ABSL_GUARDED_BY(mutex_) = FinishLabel::kNone;
  std::string cause_ ABSL_GUARDED_BY(mutex_);
};

// The model that a request means, or why there is none: NOT_FOUND, UNAVAILABLE, INVALID_ARGUMENT,
// PERMISSION_DENIED where the caller (null: anybody) may not use it, served or not.
[[nodiscard]] absl::StatusOr<std::shared_ptr<const ServedModel>> ModelOrStatus(
    Core* core, const Caller* caller, const Resolution& resolution, const std::string& name,
    const std::string& field);

}  // namespace nibble::gateway
