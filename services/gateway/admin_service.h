// The operators' port.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>

#include "nibble/admin/v1/admin.grpc.pb.h"
#include "services/gateway/core.h"

namespace nibble::gateway {

// Thread-safe.
class AdminServiceHandlers final : public admin::v1::AdminService::CallbackService {
 public:
  // `set_draining` is called on gRPC's threads.
  AdminServiceHandlers(Core* core, std::function<void(bool)> set_draining)
      : core_(core), set_draining_(std::move(set_draining)) {}

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const admin::v1::GetServerInfoRequest* request,
                                          admin::v1::GetServerInfoResponse* response) override;
  grpc::ServerUnaryReactor* GetMemoryPlan(grpc::CallbackServerContext* context,
                                          const admin::v1::GetMemoryPlanRequest* request,
                                          admin::v1::GetMemoryPlanResponse* response) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context,
                                  const admin::v1::DrainRequest* request,
                                  admin::v1::DrainResponse* response) override;
  grpc::ServerUnaryReactor* Undrain(grpc::CallbackServerContext* context,
                                    const admin::v1::UndrainRequest* request,
                                    admin::v1::UndrainResponse* response) override;
  grpc::ServerUnaryReactor* SetLogLevel(grpc::CallbackServerContext* context,
                                        const admin::v1::SetLogLevelRequest* request,
                                        admin::v1::SetLogLevelResponse* response) override;

 private:
  // The finished reactor where the call may not be answered: where keys are asked for, only those
  // marked as admin may. Null: it may.
  [[nodiscard]] grpc::ServerUnaryReactor* Refuse(grpc::CallbackServerContext* context) const;
  Core* const core_;
  const std::function<void(bool)> set_draining_;
};

}  // namespace nibble::gateway
