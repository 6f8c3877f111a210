// Generate, GenerateStream, Chat, ChatStream: each is its messages around a shared base.
#pragma once

#include "services/gateway/event_stream.h"
#include "services/gateway/unary_call.h"

namespace nibble::gateway {

class GenerateCall final : public UnaryGeneration {
 public:
  GenerateCall(Core* core, grpc::CallbackServerContext* context, grpc::ByteBuffer* response)
      : UnaryGeneration(core, Rpc::kGenerate, context, response) {}

 private:
  absl::StatusOr<OwnedInput> Parse(const grpc::ByteBuffer& bytes) const override;
  grpc::ByteBuffer Encode(Collected collected) const override;
};

class ChatCall final : public UnaryGeneration {
 public:
  ChatCall(Core* core, grpc::CallbackServerContext* context, grpc::ByteBuffer* response)
      : UnaryGeneration(core, Rpc::kChat, context, response) {}

 private:
  absl::StatusOr<OwnedInput> Parse(const grpc::ByteBuffer& bytes) const override;
  grpc::ByteBuffer Encode(Collected collected) const override;
};

class GenerateStreamCall final : public EventStream {
 public:
  GenerateStreamCall(Core* core, grpc::CallbackServerContext* context)
      : EventStream(core, Rpc::kGenerateStream, context) {}

 private:
  absl::StatusOr<OwnedInput> Parse(const grpc::ByteBuffer& bytes) const override;
  grpc::ByteBuffer Encode(const std::string& request_id, StreamEvent event) const override;
};

class ChatStreamCall final : public EventStream {
 public:
  ChatStreamCall(Core* core, grpc::CallbackServerContext* context)
      : EventStream(core, Rpc::kChatStream, context) {}

 private:
  absl::StatusOr<OwnedInput> Parse(const grpc::ByteBuffer& bytes) const override;
  grpc::ByteBuffer Encode(const std::string& request_id, StreamEvent event) const override;
};

}  // namespace nibble::gateway
