#include "services/gateway/services.h"

#include "services/gateway/generation_rpcs.h"
#include "services/gateway/model_rpcs.h"
#include "services/gateway/text_rpcs.h"

namespace nibble::gateway {
namespace {

template <typename Call, typename... Arguments>
Call* StartCall(const grpc::ByteBuffer& request, Arguments... arguments) {
  auto* call = new Call(arguments...);  // deletes itself when gRPC is done with it
  call->Start(request);
  return call;
}

}  // namespace

grpc::ServerUnaryReactor* InferenceServiceHandlers::Generate(grpc::CallbackServerContext* context,
                                                             const grpc::ByteBuffer* request,
                                                             grpc::ByteBuffer* response) {
  return StartCall<GenerateCall>(*request, core_, context, response);
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* InferenceServiceHandlers::GenerateStream(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return StartCall<GenerateStreamCall>(*request, core_, context);
}

grpc::ServerUnaryReactor* InferenceServiceHandlers::Chat(grpc::CallbackServerContext* context,
                                                         const grpc::ByteBuffer* request,
                                                         grpc::ByteBuffer* response) {
  return StartCall<ChatCall>(*request, core_, context, response);
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* InferenceServiceHandlers::ChatStream(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return StartCall<ChatStreamCall>(*request, core_, context);
}

grpc::ServerUnaryReactor* InferenceServiceHandlers::Tokenize(grpc::CallbackServerContext* context,
                                                             const grpc::ByteBuffer* request,
                                                             grpc::ByteBuffer* response) {
  return StartCall<TokenizeCall>(*request, core_, context, response);
}

grpc::ServerUnaryReactor* InferenceServiceHandlers::Detokenize(grpc::CallbackServerContext* context,
                                                               const grpc::ByteBuffer* request,
                                                               grpc::ByteBuffer* response) {
  return StartCall<DetokenizeCall>(*request, core_, context, response);
}

grpc::ServerUnaryReactor* ModelServiceHandlers::ListModels(grpc::CallbackServerContext* context,
                                                           const grpc::ByteBuffer* request,
                                                           grpc::ByteBuffer* response) {
  return StartCall<ListModelsCall>(*request, core_, context, response);
}

grpc::ServerUnaryReactor* ModelServiceHandlers::GetModel(grpc::CallbackServerContext* context,
                                                         const grpc::ByteBuffer* request,
                                                         grpc::ByteBuffer* response) {
  return StartCall<GetModelCall>(*request, core_, context, response);
}

}  // namespace nibble::gateway
