// The client's side of a streaming generation: events out, one write at a time.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "services/gateway/call_base.h"
#include "services/gateway/event_queue.h"
#include "services/gateway/generation.h"

namespace nibble::gateway {

// One per call; owns itself until OnDone. A derived class knows its RPC's messages.
class EventStream : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                    public CallBase,
                    public ClientSink {
 public:
  // Everything happens from here on; `bytes` are gRPC's and valid during the call.
  void Start(const grpc::ByteBuffer& bytes);

 protected:
  EventStream(Core* core, Rpc rpc, grpc::CallbackServerContext* context);

  [[nodiscard]] virtual absl::StatusOr<OwnedInput> Parse(const grpc::ByteBuffer& bytes) const = 0;
  [[nodiscard]] virtual grpc::ByteBuffer Encode(const std::string& request_id,
                                                StreamEvent event) const = 0;

 private:
  // ClientSink, under the generation's lock.
  void OnStarted(const std::string& request_id, inference::v1::Started started) override;
  absl::Status OnDelta(inference::v1::Delta delta) override;
  void OnFinished(inference::v1::Finished finished) override;
  void OnEnd(GenerationEnd end) override;
  bool Full() override;

  // gRPC.
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

  // LiveCall.
  void Sweep(Deadline now) override;
  void Cut(const absl::Status& status) override;

  void Push(StreamEvent event);
  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FinishIfFlushed() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CountBuffered() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  [[nodiscard]] size_t Buffered() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return queue_.bytes() + writing_bytes_;
  }

  const std::shared_ptr<Generation> generation_;
  absl::Mutex mutex_;
  std::string request_id_ ABSL_GUARDED_BY(mutex_);
  EventQueue queue_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::ByteBuffer write_ ABSL_GUARDED_BY(mutex_);
  size_t writing_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  bool full_ ABSL_GUARDED_BY(mutex_) = false;  // the generation waits to be resumed
  Deadline write_began_ ABSL_GUARDED_BY(mutex_);
  size_t counted_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  std::optional<GenerationEnd> end_ ABSL_GUARDED_BY(mutex_);
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;  // Finish was called
};

}  // namespace nibble::gateway
