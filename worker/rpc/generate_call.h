// One Generate stream: receives tokens from the engine, writes them to the client.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "base/clock.h"
#include "nibble/worker/v1/worker.pb.h"
#include "worker/engine/engine.h"
#include "worker/rpc/outbox.h"

namespace nibble::rpc {

class GenerateCall;

// The streams that are open, for Abort, for the sweep over stalled readers and for shutdown.
// Thread-safe. A call is in the list from Open() to its OnDone().
class OpenCalls {
 public:
  void Add(GenerateCall* call);
  void Remove(GenerateCall* call);
  void Abort(const std::string& request_id);
  void Sweep(Deadline now, Duration stall_limit);
  [[nodiscard]] size_t count() const;

 private:
  mutable absl::Mutex mutex_;
  std::vector<GenerateCall*> calls_ ABSL_GUARDED_BY(mutex_);
};

// Borrowed; outlive every call.
struct GenerateCallContext {
  engine::Engine* engine = nullptr;
  const Clock* clock = nullptr;
  Outbox* outbox = nullptr;
  OpenCalls* open_calls = nullptr;
};

// Sink calls come from the engine thread, OnWriteDone() and the like from gRPC's threads,
// SendPending() from the outbox's.
// At most one write is outstanding; tokens that arrive meanwhile leave together in the next one.
//
// It keeps itself alive until gRPC is done with it, and the engine holds it until OnFinished():
// whichever is later destroys it.
class GenerateCall final : public grpc::ServerWriteReactor<worker::v1::GenerateResponse>,
                           public engine::Sink,
                           public OutboxEntry,
                           public std::enable_shared_from_this<GenerateCall> {
 public:
  // What a stream may hold unsent. A reader that falls further behind is cut off.
  static constexpr size_t kUnsentBytesMax = 64 * 1024;

  // Hands the request to the engine and returns the reactor of its stream; a request that the
  // engine refuses ends with its status.
  [[nodiscard]] static GenerateCall* Open(const GenerateCallContext& context,
                                          grpc::CallbackServerContext* rpc, std::string request_id,
                                          engine::Request request);

  void OnAdmitted(int32_t cached_prompt_tokens) override;
  void OnTokens(std::span<const engine::OutputToken> tokens) override;
  void OnFinished(const engine::Finish& finish) override;

  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

  void SendPending() override;

  // Cuts off a reader that fell too far behind, or has not taken a message for `stall_limit`.
  void CheckReader(Deadline now, Duration stall_limit);
  void CancelSequence();
  [[nodiscard]] const std::string& request_id() const { return request_id_; }

 private:
  // Tokens on their way, flat: no allocation per token once warm.
  struct Unsent {
    std::vector<uint32_t> ids;
    std::vector<float> logprobs;          // one per id, where asked for
    std::vector<int32_t> top_counts;      // one per id, where asked for
    std::vector<step::TokenLogprob> top;  // the ids' alternatives, one behind the other
    void Clear();
    void MoveTo(worker::v1::Tokens* message);
    [[nodiscard]] size_t bytes() const;
  };
  enum class Send { kNothing, kAdmitted, kTokens, kFinished, kStatus };

  GenerateCall(const GenerateCallContext& context, grpc::CallbackServerContext* rpc,
               std::string request_id, bool logprobs);
  void Wake() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  [[nodiscard]] Send NextSend() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  [[nodiscard]] absl::Status FinalStatus() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void SendFinished(const engine::Finish& finish);
  void FinishWith(const absl::Status& status, uint64_t tokens_sent);

  const GenerateCallContext context_;
  grpc::CallbackServerContext* const rpc_;
  const std::string request_id_;
  const bool logprobs_;

  // Belong to whoever set writing_.
  worker::v1::GenerateResponse response_;
  Unsent sending_;

  absl::Mutex mutex_;
  std::shared_ptr<GenerateCall> self_ ABSL_GUARDED_BY(mutex_);  // until OnDone
  std::optional<engine::RequestId> sequence_ ABSL_GUARDED_BY(mutex_);
  std::optional<int32_t> admitted_ ABSL_GUARDED_BY(mutex_);  // not yet sent
  Unsent unsent_ ABSL_GUARDED_BY(mutex_);
  std::optional<engine::Finish> finish_ ABSL_GUARDED_BY(mutex_);
  uint64_t tokens_sent_ ABSL_GUARDED_BY(mutex_) = 0;
  Deadline write_began_ ABSL_GUARDED_BY(mutex_);
  bool cancel_wanted_ ABSL_GUARDED_BY(mutex_) = false;
  bool queued_ ABSL_GUARDED_BY(mutex_) = false;  // in the outbox
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;  // the client is gone
  bool too_slow_ ABSL_GUARDED_BY(mutex_) = false;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;  // the status was handed to gRPC
};

}  // namespace nibble::rpc
