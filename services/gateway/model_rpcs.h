// ListModels and GetModel.
#pragma once

#include <vector>

#include "nibble/inference/v1/inference.pb.h"
#include "services/gateway/router.h"
#include "services/gateway/unary_call.h"

namespace nibble::gateway {

// The models that groups have told of, by name.
[[nodiscard]] std::vector<inference::v1::Model> DescribeModels(Core* core);

class ListModelsCall final : public UnaryCall {
 public:
  ListModelsCall(Core* core, grpc::CallbackServerContext* context, grpc::ByteBuffer* response)
      : UnaryCall(core, Rpc::kListModels, context, response) {}

 private:
  void Run(const grpc::ByteBuffer& bytes) override;
};

class GetModelCall final : public UnaryCall {
 public:
  GetModelCall(Core* core, grpc::CallbackServerContext* context, grpc::ByteBuffer* response)
      : UnaryCall(core, Rpc::kGetModel, context, response) {}

 private:
  void Run(const grpc::ByteBuffer& bytes) override;
};

}  // namespace nibble::gateway
