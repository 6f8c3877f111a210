// Every status that a generation can end with, in one place: code, reason, details and trailers.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "base/clock.h"

namespace nibble::gateway {

// The trailer that gRPC clients' own retries obey.
inline constexpr char kPushbackTrailer[] = "grpc-retry-pushback-ms";
inline constexpr char kTokensSentTrailer[] = "x-tokens-sent";
inline constexpr char kGroupTrailer[] = "x-group";
inline constexpr char kCauseTrailer[] = "x-cause";

[[nodiscard]] absl::Status UnknownModelError(std::string_view model);
// No model was named, and several are served.
[[nodiscard]] absl::Status ModelNotNamedError(std::string_view field);
// `delay` is jittered by the caller, so that clients do not come back together.
[[nodiscard]] absl::Status NoGroupReadyError(Duration delay);
[[nodiscard]] absl::Status DrainingError(Duration delay);
// The gateway ends before the answer is complete.
[[nodiscard]] absl::Status DrainCutError();
// A bound of the gateway itself: calls in flight, texts to tokenize.
[[nodiscard]] absl::Status OverloadedError(std::string_view what, int64_t limit);
// The groups' own: their slots and queues are taken.
[[nodiscard]] absl::Status QueueFullError(int64_t limit);
// No key, or none that is known: the same words for both.
[[nodiscard]] absl::Status UnauthenticatedError();
// The key may not have `what`, which is a closed word or a name that the client gave itself.
[[nodiscard]] absl::Status PermissionDeniedError(std::string_view what);
// A bound of the key or its tenant: `what` is in flight; or its tokens are used up for `delay`.
[[nodiscard]] absl::Status QuotaError(std::string_view what, int64_t limit);
[[nodiscard]] absl::Status TokenQuotaError(int64_t tokens_per_minute, Duration delay);
[[nodiscard]] absl::Status SlowReaderError(Duration stalled);
[[nodiscard]] absl::Status DeadlineError();
[[nodiscard]] absl::Status CancelledError();
// A group was lost after the first token.
[[nodiscard]] absl::Status WorkerLostError(uint64_t tokens_sent);
// Fixed text; the cause id finds the log line that says more.
[[nodiscard]] absl::Status EngineFaultError(std::string_view cause_id);
[[nodiscard]] absl::Status ResponseTooLargeError(int64_t limit);

// What the end of a worker stream means for the request.
enum class UpstreamFault {
  kNone,      // the client's or the request's own: its status goes on as it is
  kGroup,     // the group is gone or leaving: another one may take the request before commit
  kEngine,    // this request failed inside: once more elsewhere before commit, else INTERNAL
  kDeadline,  // our forwarded deadline
};
[[nodiscard]] UpstreamFault ClassifyUpstream(const absl::Status& status);

// What the client is told where a worker's own refusal goes on: its code, message and details, with
// a reason added where the worker gave none. REQUIRES: ClassifyUpstream(status) is kNone.
[[nodiscard]] absl::Status PassOn(const absl::Status& status);

// The value of kPushbackTrailer, where the status asks for one: "-1" = do not retry.
[[nodiscard]] std::optional<std::string> Pushback(const absl::Status& status);

}  // namespace nibble::gateway
