#include "services/gateway/call_base.h"

#include <grpc/grpc.h>

#include <iterator>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/grpc_deadline.h"
#include "base/grpc_status.h"
#include "base/status.h"
#include "services/gateway/status_contract.h"

namespace nibble::gateway {
namespace {

// As HPACK counts them.
size_t MetadataBytes(const grpc::CallbackServerContext& context) {
  constexpr size_t kPerEntry = 32;
  size_t bytes = 0;
  for (const auto& [key, value] : context.client_metadata()) {
    bytes += key.size() + value.size() + kPerEntry;
  }
  return bytes;
}

}  // namespace

CallBase::CallBase(Core* core, Rpc rpc, grpc::CallbackServerContext* context)
    : core_(core),
      rpc_(rpc),
      context_(context),
      arrived_(core->clock->Now()),
      deadline_(FromGrpcDeadline(context->raw_deadline(), *core->clock)) {
  core_->metrics.rpcs[static_cast<size_t>(rpc)].started->Increment();
}

absl::StatusOr<std::shared_ptr<const Caller>> FindCaller(
    const Core& core, const grpc::CallbackServerContext& context) {
  if (core.callers == nullptr) return nullptr;
  const auto [begin, end] = context.client_metadata().equal_range("authorization");
  if (begin == end || std::next(begin) != end) return UnauthenticatedError();
  return core.callers->Find({begin->second.data(), begin->second.size()});
}

absl::Status CallBase::Enter() {
  // First: who shows no key learns nothing of the gateway's state.
  ASSIGN_OR_RETURN(caller_, FindCaller(*core_, *context_));
  if (core_->draining.load()) return DrainingError(core_->RetryDelay());
  if (!core_->calls.Enter(this)) {
    return OverloadedError("calls in flight", static_cast<int64_t>(core_->calls.limit()));
  }
  entered_ = true;
  if (MetadataBytes(*context_) > core_->limits.call_metadata_bytes) {
    return OverloadedError("bytes of metadata",
                           static_cast<int64_t>(core_->limits.call_metadata_bytes));
  }
  if (caller_ != nullptr) {
    RETURN_IF_ERROR(caller_->Enter());
    has_places_ = true;
  }
  if (DeadlinePassed()) return DeadlineError();
  return absl::OkStatus();
}

void CallBase::Leave() {
  if (entered_) core_->calls.Leave(this);
}

void CallBase::AddTrailer(const char* key, const std::string& value) {
  context_->AddTrailingMetadata(key, value);
}

grpc::Status CallBase::Close(const absl::Status& status) {
  // Before the client hears of the end: it may begin its next call at once.
  if (has_places_) caller_->Leave();
  const RpcMetrics& metrics = core_->metrics.rpcs[static_cast<size_t>(rpc_)];
  const auto code = static_cast<size_t>(status.code());
  metrics.handled[code < kStatusCodes ? code : static_cast<size_t>(absl::StatusCode::kUnknown)]
      ->Increment();
  metrics.seconds->Observe(std::chrono::duration<double>(core_->clock->Now() - arrived_).count());
  if (const auto pushback = Pushback(status)) AddTrailer(kPushbackTrailer, *pushback);
  return ToGrpcStatus(status);
}

grpc::Status CallBase::Close(const GenerationEnd& end) {
  AddTrailer(kTokensSentTrailer, absl::StrCat(end.tokens_delivered));
  if (!end.group.empty()) AddTrailer(kGroupTrailer, end.group);
  if (!end.cause.empty()) AddTrailer(kCauseTrailer, end.cause);
  if (!end.request_id.empty()) AddTrailer("x-request-id", end.request_id);
  return Close(end.status);
}

void CallBase::Reset(const absl::Status& status) {
  grpc_call_cancel_with_status(context_->c_call(), static_cast<grpc_status_code>(status.code()),
                               std::string(status.message()).c_str(), nullptr);
}

}  // namespace nibble::gateway
