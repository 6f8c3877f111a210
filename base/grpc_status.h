// absl::Status <-> grpc::Status, with google.rpc details, and the makers of those details.
//
// Details travel as payloads of absl::Status under their type URLs and on the wire as one
// google.rpc.Status in the trailer grpc-status-details-bin. Clients refuse trailers above 8 KiB, so
// both the message and the details are cut to fit well below that. Thread-compatible value code.
#pragma once

#include <grpcpp/support/status.h>

#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "base/clock.h"

namespace nibble {

inline constexpr std::string_view kErrorDomain = "nibble";

// Why, for programs: ErrorInfo.reason. A closed set; documented with the API.
namespace reason {
inline constexpr std::string_view kInvalidParameter = "INVALID_PARAMETER";
inline constexpr std::string_view kContextLengthExceeded = "CONTEXT_LENGTH_EXCEEDED";
inline constexpr std::string_view kModelNotFound = "MODEL_NOT_FOUND";
inline constexpr std::string_view kOverloaded = "OVERLOADED";
inline constexpr std::string_view kQueueFull = "QUEUE_FULL";
inline constexpr std::string_view kQueueTimeout = "QUEUE_TIMEOUT";
inline constexpr std::string_view kSlowReader = "SLOW_READER";
inline constexpr std::string_view kDraining = "DRAINING";
inline constexpr std::string_view kNoWorker = "NO_WORKER";
inline constexpr std::string_view kWorkerLost = "WORKER_LOST";
inline constexpr std::string_view kDeadline = "DEADLINE";
inline constexpr std::string_view kEngineFault = "ENGINE_FAULT";
inline constexpr std::string_view kCapability = "CAPABILITY";
inline constexpr std::string_view kResponseTooLarge = "RESPONSE_TOO_LARGE";
inline constexpr std::string_view kUnauthenticated = "UNAUTHENTICATED";
inline constexpr std::string_view kPermissionDenied = "PERMISSION_DENIED";
inline constexpr std::string_view kQuota = "QUOTA";
}  // namespace reason

struct FieldViolation {
  std::string field;        // path inside the request, e.g. "sampling.top_p"
  std::string description;  // value and limit; never a piece of a prompt
};

using ErrorMetadata = std::vector<std::pair<std::string, std::string>>;

// Sets ErrorInfo{domain "nibble", reason, metadata}. REQUIRES: !status->ok().
void SetErrorInfo(absl::Status* status, std::string_view reason,
                  const ErrorMetadata& metadata = {});
// ErrorInfo.reason where the status carries one of our domain; else empty.
[[nodiscard]] std::string ErrorReason(const absl::Status& status);
[[nodiscard]] ErrorMetadata ErrorInfoMetadata(const absl::Status& status);

// Says when a client may try again.
void SetRetryInfo(absl::Status* status, Duration delay);
[[nodiscard]] std::optional<Duration> RetryDelay(const absl::Status& status);

// Says which resource was meant.
void SetResourceInfo(absl::Status* status, std::string_view type, std::string_view name,
                     std::string_view description);

// INVALID_ARGUMENT with one BadRequest violation per entry; the message names them all.
// REQUIRES: !violations.empty().
[[nodiscard]] absl::Status InvalidFieldsError(std::span<const FieldViolation> violations,
                                              std::string_view reason = reason::kInvalidParameter);
[[nodiscard]] std::vector<FieldViolation> FieldViolations(const absl::Status& status);

// Code, message and details; a code outside the canonical ones becomes UNKNOWN.
[[nodiscard]] grpc::Status ToGrpcStatus(const absl::Status& status);
[[nodiscard]] absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace nibble
