// The client's side of an RPC with one response.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "services/gateway/call_base.h"
#include "services/gateway/generation.h"

namespace nibble::gateway {

// Base of the RPCs that generate nothing. One per call; owns itself until OnDone.
class UnaryCall : public grpc::ServerUnaryReactor, public CallBase {
 public:
  void Start(const grpc::ByteBuffer& bytes);

 protected:
  UnaryCall(Core* core, Rpc rpc, grpc::CallbackServerContext* context, grpc::ByteBuffer* response)
      : CallBase(core, rpc, context), response_(response) {}

  // Parses and answers, now or later, by one Reply. Runs on gRPC's thread.
  virtual void Run(const grpc::ByteBuffer& bytes) = 0;
  // Any thread, once.
  void Reply(const absl::StatusOr<std::unique_ptr<google::protobuf::Message>>& response);
  // Runs `work` on the tokenizing pool, then replies; `bytes` is what it holds in memory.
  using Work = std::function<absl::StatusOr<std::unique_ptr<google::protobuf::Message>>()>;
  void ReplyFromPool(size_t bytes, Work work);

 private:
  void OnDone() override;
  void Sweep(Deadline) override {}
  void Cut(const absl::Status&) override {}  // short: drained by waiting

  grpc::ByteBuffer* const response_;
};

// Base of Generate and Chat: collects the events of a generation into one response.
class UnaryGeneration : public grpc::ServerUnaryReactor, public CallBase, public ClientSink {
 public:
  void Start(const grpc::ByteBuffer& bytes);

 protected:
  UnaryGeneration(Core* core, Rpc rpc, grpc::CallbackServerContext* context,
                  grpc::ByteBuffer* response);

  // Generate's response; Chat's has the same fields.
  struct Collected {
    std::string request_id;
    std::string model;
    uint64_t seed = 0;
    uint32_t max_tokens = 0;
    google::protobuf::RepeatedPtrField<inference::v1::Choice> choices;
    inference::v1::Usage usage;
    inference::v1::Timings timings;
  };
  [[nodiscard]] virtual absl::StatusOr<OwnedInput> Parse(const grpc::ByteBuffer& bytes) const = 0;
  [[nodiscard]] virtual grpc::ByteBuffer Encode(Collected collected) const = 0;

 private:
  // ClientSink, under the generation's lock.
  void OnStarted(const std::string& request_id, inference::v1::Started started) override;
  absl::Status OnDelta(inference::v1::Delta delta) override;
  void OnFinished(inference::v1::Finished finished) override;
  void OnEnd(GenerationEnd end) override;
  bool Full() override { return false; }

  void OnCancel() override;
  void OnDone() override;
  void Sweep(Deadline) override {}
  void Cut(const absl::Status& status) override;

  grpc::ByteBuffer* const response_;
  const std::shared_ptr<Generation> generation_;
  // Used under the generation's lock alone.
  Collected collected_;
  size_t bytes_ = 0;
};

}  // namespace nibble::gateway
