// Tokenize and Detokenize.
#pragma once

#include "services/gateway/unary_call.h"

namespace nibble::gateway {

class TokenizeCall final : public UnaryCall {
 public:
  TokenizeCall(Core* core, grpc::CallbackServerContext* context, grpc::ByteBuffer* response)
      : UnaryCall(core, Rpc::kTokenize, context, response) {}

 private:
  void Run(const grpc::ByteBuffer& bytes) override;
};

class DetokenizeCall final : public UnaryCall {
 public:
  DetokenizeCall(Core* core, grpc::CallbackServerContext* context, grpc::ByteBuffer* response)
      : UnaryCall(core, Rpc::kDetokenize, context, response) {}

 private:
  void Run(const grpc::ByteBuffer& bytes) override;
};

}  // namespace nibble::gateway
