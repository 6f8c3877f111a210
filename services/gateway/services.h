// The public services: each method makes its call's reactor.
#pragma once

#include <grpcpp/grpcpp.h>

#include "nibble/inference/v1/inference.grpc.pb.h"
#include "services/gateway/core.h"

namespace nibble::gateway {

// Methods take and give bytes: see message_codec.h for why.
namespace raw {
using I = inference::v1::InferenceService;
using Inference = I::WithRawCallbackMethod_Generate<I::WithRawCallbackMethod_GenerateStream<
    I::WithRawCallbackMethod_Chat<I::WithRawCallbackMethod_ChatStream<
        I::WithRawCallbackMethod_Tokenize<I::WithRawCallbackMethod_Detokenize<I::Service>>>>>>;
using M = inference::v1::ModelService;
using Model = M::WithRawCallbackMethod_ListModels<M::WithRawCallbackMethod_GetModel<M::Service>>;
}  // namespace raw

class InferenceServiceHandlers final : public raw::Inference {
 public:
  explicit InferenceServiceHandlers(Core* core) : core_(core) {}

  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* GenerateStream(
      grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* Chat(grpc::CallbackServerContext* context,
                                 const grpc::ByteBuffer* request,
                                 grpc::ByteBuffer* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* ChatStream(grpc::CallbackServerContext* context,
                                                         const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;

 private:
  Core* const core_;
};

class ModelServiceHandlers final : public raw::Model {
 public:
  explicit ModelServiceHandlers(Core* core) : core_(core) {}

  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;

 private:
  Core* const core_;
};

}  // namespace nibble::gateway
