#include "worker/rpc/engine_status.h"

#include <string_view>

#include "base/clock.h"
#include "base/grpc_status.h"

namespace nibble::rpc {
namespace {

constexpr Duration kRetryElsewhere = std::chrono::milliseconds(500);

absl::Status With(absl::Status status, std::string_view reason) {
  if (ErrorReason(status).empty()) SetErrorInfo(&status, reason);
  return status;
}

absl::Status Unavailable(absl::Status status, std::string_view reason) {
  if (ErrorReason(status).empty()) SetErrorInfo(&status, reason, {{"retryable", "true"}});
  SetRetryInfo(&status, kRetryElsewhere);
  return status;
}

}  // namespace

absl::Status WithSubmitReason(absl::Status status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:  // the engine checks lengths alone
      return With(std::move(status), reason::kContextLengthExceeded);
    case absl::StatusCode::kResourceExhausted:
      return With(std::move(status), reason::kQueueFull);
    case absl::StatusCode::kUnavailable:
      return Unavailable(std::move(status), reason::kDraining);
    case absl::StatusCode::kDeadlineExceeded:
      return With(std::move(status), reason::kDeadline);
    default:
      return status;
  }
}

absl::Status WithFinishReason(absl::Status status) {
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
      return With(std::move(status), reason::kQueueTimeout);
    case absl::StatusCode::kDeadlineExceeded:
      return With(std::move(status), reason::kDeadline);
    case absl::StatusCode::kInternal:
      return With(std::move(status), reason::kEngineFault);
    case absl::StatusCode::kUnavailable:
      return Unavailable(std::move(status), reason::kWorkerLost);
    default:
      return status;
  }
}

}  // namespace nibble::rpc
