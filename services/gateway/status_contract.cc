#include "services/gateway/status_contract.h"

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/grpc_status.h"

namespace nibble::gateway {
namespace {

int64_t Milliseconds(Duration duration) {
  return std::chrono::duration_cast<std::chrono::milliseconds>(duration).count();
}

absl::Status WithReason(absl::Status status, std::string_view reason,
                        const ErrorMetadata& metadata = {}) {
  SetErrorInfo(&status, reason, metadata);
  return status;
}

absl::Status RetryLater(absl::Status status, std::string_view reason, Duration delay) {
  SetErrorInfo(&status, reason, {{"retryable", "true"}});
  SetRetryInfo(&status, delay);
  return status;
}

}  // namespace

absl::Status UnknownModelError(std::string_view model) {
  absl::Status status =
      absl::NotFoundError(absl::StrCat("model \"", std::string(model), "\" is not served here"));
  SetErrorInfo(&status, reason::kModelNotFound);
  SetResourceInfo(&status, "model", model, "is not served here");
  return status;
}

absl::Status ModelNotNamedError(std::string_view field) {
  const FieldViolation violation = {std::string(field), "is empty; several models are served"};
  return InvalidFieldsError({&violation, 1});
}

absl::Status NoGroupReadyError(Duration delay) {
  return RetryLater(absl::UnavailableError("no worker group that serves the model is ready"),
                    reason::kNoWorker, delay);
}

absl::Status DrainingError(Duration delay) {
  return RetryLater(absl::UnavailableError("the gateway is draining"), reason::kDraining, delay);
}

absl::Status DrainCutError() {
  return WithReason(absl::UnavailableError("the gateway stopped before the answer was complete"),
                    reason::kDraining);
}

absl::Status OverloadedError(std::string_view what, int64_t limit) {
  return WithReason(absl::ResourceExhaustedError(
                        absl::StrCat("too many ", std::string(what), "; limit is ", limit)),
                    reason::kOverloaded);
}

absl::Status QueueFullError(int64_t limit) {
  return WithReason(
      absl::ResourceExhaustedError(absl::StrCat(
          "every group of the model is full; together they take ", limit, " requests")),
      reason::kQueueFull);
}

absl::Status UnauthenticatedError() {
  return WithReason(absl::UnauthenticatedError(
                        "a key is needed: metadata \"authorization: Bearer KEY\" with a known key"),
                    reason::kUnauthenticated);
}

absl::Status PermissionDeniedError(std::string_view what) {
  return WithReason(
      absl::PermissionDeniedError(absl::StrCat("the key may not use ", std::string(what))),
      reason::kPermissionDenied);
}

absl::Status QuotaError(std::string_view what, int64_t limit) {
  return WithReason(absl::ResourceExhaustedError(
                        absl::StrCat("too many ", std::string(what), "; limit is ", limit)),
                    reason::kQuota);
}

absl::Status TokenQuotaError(int64_t tokens_per_minute, Duration delay) {
  return RetryLater(
      absl::ResourceExhaustedError(absl::StrCat("the tenant's tokens are used up; quota is ",
                                                tokens_per_minute, " a minute at this gateway")),
      reason::kQuota, delay);
}

absl::Status SlowReaderError(Duration stalled) {
  return WithReason(absl::ResourceExhaustedError(
                        absl::StrCat("the client read nothing for ", Milliseconds(stalled), " ms")),
                    reason::kSlowReader);
}

absl::Status DeadlineError() {
  return WithReason(absl::DeadlineExceededError("the deadline passed"), reason::kDeadline);
}

absl::Status CancelledError() { return absl::CancelledError("the client cancelled the call"); }

absl::Status WorkerLostError(uint64_t tokens_sent) {
  return WithReason(
      absl::UnavailableError(absl::StrCat("the worker group was lost after ", tokens_sent,
                                          " tokens; the answer cannot be completed")),
      reason::kWorkerLost, {{"tokens_sent", absl::StrCat(tokens_sent)}});
}

absl::Status EngineFaultError(std::string_view cause_id) {
  return WithReason(absl::InternalError("the engine could not complete the request"),
                    reason::kEngineFault, {{"cause", std::string(cause_id)}});
}

absl::Status ResponseTooLargeError(int64_t limit) {
  return WithReason(
      absl::ResourceExhaustedError(absl::StrCat("the whole answer is larger than ", limit,
                                                " bytes; ask for it as a stream")),
      reason::kResponseTooLarge);
}

UpstreamFault ClassifyUpstream(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kNotFound:
      return UpstreamFault::kNone;
    case absl::StatusCode::kDeadlineExceeded:
      return UpstreamFault::kDeadline;
    // A worker cancels nothing by itself: its process is on its way out.
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kAborted:
      return UpstreamFault::kGroup;
    default:
      return UpstreamFault::kEngine;
  }
}

absl::Status PassOn(const absl::Status& status) {
  CHECK(ClassifyUpstream(status) == UpstreamFault::kNone);
  if (!ErrorReason(status).empty()) return status;
  absl::Status passed = status;
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
      SetErrorInfo(&passed, reason::kQueueFull);
      break;
    case absl::StatusCode::kNotFound:
      SetErrorInfo(&passed, reason::kModelNotFound);
      break;
    default:
      SetErrorInfo(&passed, reason::kInvalidParameter);
  }
  return passed;
}

std::optional<std::string> Pushback(const absl::Status& status) {
  if (const auto delay = RetryDelay(status)) return absl::StrCat(Milliseconds(*delay));
  if (status.code() == absl::StatusCode::kResourceExhausted) return "-1";
  return std::nullopt;
}

}  // namespace nibble::gateway
