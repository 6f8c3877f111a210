#include "services/gateway/admin_service.h"

#include <string>

#include "base/grpc_status.h"
#include "base/logging.h"
#include "base/version.h"
#include "services/gateway/call_base.h"
#include "services/gateway/status_contract.h"

namespace nibble::gateway {
namespace {

grpc::ServerUnaryReactor* Done(grpc::CallbackServerContext* context,
                               const absl::Status& status = absl::OkStatus()) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace

grpc::ServerUnaryReactor* AdminServiceHandlers::Refuse(grpc::CallbackServerContext* context) const {
  const auto caller = FindCaller(*core_, *context);
  if (!caller.ok()) return Done(context, caller.status());
  if (*caller == nullptr || (*caller)->key.admin) return nullptr;
  return Done(context, PermissionDeniedError("the admin service"));
}

grpc::ServerUnaryReactor* AdminServiceHandlers::GetServerInfo(
    grpc::CallbackServerContext* context, const admin::v1::GetServerInfoRequest* /*request*/,
    admin::v1::GetServerInfoResponse* response) {
  if (auto* refused = Refuse(context)) return refused;
  const BuildInfo& build = GetBuildInfo();
  response->set_program("nibble-gateway");
  response->set_version(std::string(build.version));
  response->set_git_revision(std::string(build.git_revision));
  response->set_build(std::string(build.compiler) + ", " + std::string(build.build_type));
  response->set_draining(core_->draining.load());
  for (const GroupSnapshot& snapshot : core_->router.Snapshot()) {
    admin::v1::Group* group = response->add_groups();
    group->set_address(snapshot.address);
    group->set_ready(snapshot.ready);
    group->set_running(snapshot.load.running());
    group->set_waiting(snapshot.load.waiting());
    group->set_model(snapshot.model);
  }
  return Done(context);
}

grpc::ServerUnaryReactor* AdminServiceHandlers::GetMemoryPlan(
    grpc::CallbackServerContext* context, const admin::v1::GetMemoryPlanRequest* /*request*/,
    admin::v1::GetMemoryPlanResponse* response) {
  if (auto* refused = Refuse(context)) return refused;
  for (const GroupSnapshot& snapshot : core_->router.Snapshot()) {
    if (!snapshot.connected) continue;
    admin::v1::GroupMemory* group = response->add_groups();
    group->set_address(snapshot.address);
    group->set_model(snapshot.model);
    group->set_kv_blocks(snapshot.info.kv_blocks());
    group->set_block_tokens(snapshot.info.block_tokens());
    for (const worker::v1::RankMemory& planned : snapshot.info.memory()) {
      admin::v1::RankMemory* rank = group->add_ranks();
      rank->set_rank(planned.rank());
      rank->set_weights_bytes(planned.weights_bytes());
      rank->set_kv_cache_bytes(planned.kv_cache_bytes());
      rank->set_activations_bytes(planned.activations_bytes());
      rank->set_workspace_bytes(planned.workspace_bytes());
      rank->set_graphs_bytes(planned.graphs_bytes());
    }
  }
  return Done(context);
}

grpc::ServerUnaryReactor* AdminServiceHandlers::Drain(grpc::CallbackServerContext* context,
                                                      const admin::v1::DrainRequest* /*request*/,
                                                      admin::v1::DrainResponse* response) {
  if (auto* refused = Refuse(context)) return refused;
  set_draining_(true);
  response->set_remaining(static_cast<uint32_t>(core_->calls.size()));
  return Done(context);
}

grpc::ServerUnaryReactor* AdminServiceHandlers::Undrain(
    grpc::CallbackServerContext* context, const admin::v1::UndrainRequest* /*request*/,
    admin::v1::UndrainResponse* /*response*/) {
  if (auto* refused = Refuse(context)) return refused;
  set_draining_(false);
  return Done(context);
}

grpc::ServerUnaryReactor* AdminServiceHandlers::SetLogLevel(
    grpc::CallbackServerContext* context, const admin::v1::SetLogLevelRequest* request,
    admin::v1::SetLogLevelResponse* /*response*/) {
  if (auto* refused = Refuse(context)) return refused;
  const auto level = spdlog::level::from_str(request->level());
  // from_str says "off" for anything it does not know.
  if (level == spdlog::level::off && request->level() != "off") {
    const FieldViolation violation = {"level", "is none of trace, debug, info, warn, error, off"};
    return Done(context, InvalidFieldsError({&violation, 1}));
  }
  spdlog::set_level(level);
  return Done(context);
}

}  // namespace nibble::gateway
