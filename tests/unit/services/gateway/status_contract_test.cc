#include "services/gateway/status_contract.h"

#include <gtest/gtest.h>

#include <optional>
#include <string>
#include <vector>

#include "base/grpc_status.h"

namespace nibble::gateway {
namespace {

using absl::StatusCode;

struct Row {
  absl::Status status;
  StatusCode code;
  std::string reason;
  std::optional<std::string> pushback;
};

TEST(StatusContract, EveryRowHasItsCodeReasonAndPushback) {
  const auto delay = std::chrono::milliseconds(750);
  const std::vector<Row> rows = {
      {UnknownModelError("x"), StatusCode::kNotFound, "MODEL_NOT_FOUND", {}},
      {ModelNotNamedError("model"), StatusCode::kInvalidArgument, "INVALID_PARAMETER", {}},
      {NoGroupReadyError(delay), StatusCode::kUnavailable, "NO_WORKER", "750"},
      {DrainingError(delay), StatusCode::kUnavailable, "DRAINING", "750"},
      {DrainCutError(), StatusCode::kUnavailable, "DRAINING", {}},
      {OverloadedError("calls", 3), StatusCode::kResourceExhausted, "OVERLOADED", "-1"},
      {SlowReaderError(delay), StatusCode::kResourceExhausted, "SLOW_READER", "-1"},
      {DeadlineError(), StatusCode::kDeadlineExceeded, "DEADLINE", {}},
      {CancelledError(), StatusCode::kCancelled, "", {}},
      {WorkerLostError(5), StatusCode::kUnavailable, "WORKER_LOST", {}},
      {EngineFaultError("id"), StatusCode::kInternal, "ENGINE_FAULT", {}},
      {ResponseTooLargeError(9), StatusCode::kResourceExhausted, "RESPONSE_TOO_LARGE", "-1"}};
  for (const Row& row : rows) {
    EXPECT_EQ(row.status.code(), row.code) << row.status;
    EXPECT_EQ(ErrorReason(row.status), row.reason) << row.status;
    EXPECT_EQ(Pushback(row.status), row.pushback) << row.status;
  }
}

TEST(StatusContract, UpstreamCodesMeanWhatTheyMean) {
  const std::vector<std::pair<StatusCode, UpstreamFault>> rows = {
      {StatusCode::kInvalidArgument, UpstreamFault::kNone},
      {StatusCode::kResourceExhausted, UpstreamFault::kNone},
      {StatusCode::kNotFound, UpstreamFault::kNone},
      {StatusCode::kDeadlineExceeded, UpstreamFault::kDeadline},
      {StatusCode::kUnavailable, UpstreamFault::kGroup},
      {StatusCode::kCancelled, UpstreamFault::kGroup},
      {StatusCode::kAborted, UpstreamFault::kGroup},
      {StatusCode::kInternal, UpstreamFault::kEngine},
      {StatusCode::kUnknown, UpstreamFault::kEngine},
      {StatusCode::kUnimplemented, UpstreamFault::kEngine},
      {StatusCode::kDataLoss, UpstreamFault::kEngine},
      {StatusCode::kFailedPrecondition, UpstreamFault::kEngine}};
  for (const auto& [code, fault] : rows) {
    EXPECT_EQ(ClassifyUpstream(absl::Status(code, "x")), fault) << absl::StatusCodeToString(code);
  }
}

TEST(StatusContract, AWorkersReasonGoesOn) {
  absl::Status timeout = absl::ResourceExhaustedError("waited");
  SetErrorInfo(&timeout, reason::kQueueTimeout);
  EXPECT_EQ(PassOn(timeout), timeout);
  EXPECT_EQ(ErrorReason(PassOn(absl::ResourceExhaustedError("full"))), "QUEUE_FULL");
  EXPECT_EQ(ErrorReason(PassOn(absl::InvalidArgumentError("bad"))), "INVALID_PARAMETER");
}

TEST(StatusContract, TellsTokensSentAndCause) {
  EXPECT_EQ(ErrorInfoMetadata(WorkerLostError(17)), (ErrorMetadata{{"tokens_sent", "17"}}));
  EXPECT_EQ(ErrorInfoMetadata(EngineFaultError("abc")), (ErrorMetadata{{"cause", "abc"}}));
}

}  // namespace
}  // namespace nibble::gateway
