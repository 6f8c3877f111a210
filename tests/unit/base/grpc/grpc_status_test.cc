#include "base/grpc_status.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/clock.h"
#include "base/grpc_deadline.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace nibble {
namespace {

TEST(GrpcStatus, OkStaysOk) {
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
}

TEST(GrpcStatus, EveryCanonicalCodeSurvivesTheRoundTrip) {
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "why");
    const grpc::Status wire = ToGrpcStatus(status);
    EXPECT_EQ(static_cast<int>(wire.error_code()), code);
    EXPECT_EQ(FromGrpcStatus(wire), status);
  }
}

TEST(GrpcStatus, ForeignCodeBecomesUnknown) {
  int number = 20;  // no canonical code, yet within the range of the enum; not a constant: g++
                    // would refuse it
  const auto foreign = static_cast<grpc::StatusCode>(number);
  const grpc::Status wire(foreign, "strange");
  EXPECT_EQ(FromGrpcStatus(wire).code(), absl::StatusCode::kUnknown);
}

TEST(GrpcStatus, DetailsSurviveTheRoundTrip) {
  absl::Status status = absl::UnavailableError("no group is ready");
  SetErrorInfo(&status, reason::kNoWorker, {{"model", "m"}, {"retryable", "true"}});
  SetRetryInfo(&status, std::chrono::milliseconds(1500));
  SetResourceInfo(&status, "model", "m", "not here");
  const absl::Status back = FromGrpcStatus(ToGrpcStatus(status));
  EXPECT_EQ(back, status);
  EXPECT_EQ(ErrorReason(back), "NO_WORKER");
  EXPECT_EQ(ErrorInfoMetadata(back), (ErrorMetadata{{"model", "m"}, {"retryable", "true"}}));
  EXPECT_EQ(RetryDelay(back), std::chrono::milliseconds(1500));
}

TEST(GrpcStatus, WireFormIsGoogleRpcStatusWithTheSameCodeAndMessage) {
  const std::vector<FieldViolation> violations = {{"sampling.top_p", "is 0; allowed (0, 1]"}};
  const grpc::Status wire = ToGrpcStatus(InvalidFieldsError(violations));
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(wire.error_details()));
  EXPECT_EQ(details.code(), 3);
  EXPECT_EQ(details.message(), wire.error_message());
  ASSERT_EQ(details.details_size(), 2);
  google::rpc::ErrorInfo info;
  ASSERT_TRUE(details.details(0).UnpackTo(&info));
  EXPECT_EQ(info.domain(), "nibble");
  EXPECT_EQ(info.reason(), "INVALID_PARAMETER");
  google::rpc::BadRequest bad_request;
  ASSERT_TRUE(details.details(1).UnpackTo(&bad_request));
  ASSERT_EQ(bad_request.field_violations_size(), 1);
  EXPECT_EQ(bad_request.field_violations(0).field(), "sampling.top_p");
  EXPECT_EQ(bad_request.field_violations(0).description(), "is 0; allowed (0, 1]");
}

TEST(GrpcStatus, NamesEveryFieldAndStaysBelowTheTrailerLimit) {
  std::vector<FieldViolation> violations;
  for (int i = 0; i < 60; ++i) {
    violations.push_back({"field_" + std::to_string(i), std::string(300, 'x')});
  }
  const grpc::Status wire = ToGrpcStatus(InvalidFieldsError(violations));
  EXPECT_LT(wire.error_message().size() + wire.error_details().size() * 4 / 3, 7000U);
  const std::vector<FieldViolation> back = FieldViolations(FromGrpcStatus(wire));
  ASSERT_EQ(back.size(), violations.size());
  for (size_t i = 0; i < back.size(); ++i) EXPECT_EQ(back[i].field, violations[i].field);
}

TEST(GrpcStatus, LongMessageIsCutBetweenCharacters) {
  std::string message = "x";
  while (message.size() < 4000) message += "\u00e9";
  const grpc::Status wire = ToGrpcStatus(absl::InternalError(message));
  EXPECT_LE(wire.error_message().size(), 768U);
  EXPECT_EQ(wire.error_message().size() % 2, 1U);  // one x, then whole two-byte characters
}

TEST(GrpcStatus, GarbledDetailsAreIgnored) {
  const grpc::Status wire(grpc::StatusCode::INTERNAL, "broken", "\xff\xfe not a message");
  const absl::Status status = FromGrpcStatus(wire);
  EXPECT_EQ(status, absl::InternalError("broken"));
}

TEST(GrpcDeadline, CountsFromOurClock) {
  ManualClock clock;
  clock.Advance(std::chrono::seconds(1000));
  EXPECT_EQ(FromGrpcDeadline(gpr_inf_future(GPR_CLOCK_REALTIME), clock), Deadline::max());
  EXPECT_LT(FromGrpcDeadline(gpr_inf_past(GPR_CLOCK_REALTIME), clock), clock.Now());
  const gpr_timespec hour =
      gpr_time_add(gpr_now(GPR_CLOCK_REALTIME), gpr_time_from_seconds(3600, GPR_TIMESPAN));
  const Duration left = FromGrpcDeadline(hour, clock) - clock.Now();
  EXPECT_LE(left, std::chrono::seconds(3600));
  EXPECT_GT(left, std::chrono::seconds(3000));
}

}  // namespace
}  // namespace nibble
