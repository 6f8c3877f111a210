#include "services/gateway/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/text_serializer.h>

#include <set>
#include <string>

#include "absl/strings/str_cat.h"

namespace nibble::gateway {
namespace {

std::set<std::string> FamilyNames(const GatewayMetrics& metrics) {
  std::set<std::string> names;
  for (const auto& family : metrics.registry()->Collect()) names.insert(family.name);
  return names;
}

size_t SeriesCount(const GatewayMetrics& metrics) {
  size_t count = 0;
  for (const auto& family : metrics.registry()->Collect()) count += family.metric.size();
  return count;
}

// Names are an interface: dashboards and alerts are written against them.
TEST(GatewayMetrics, NamesAreThese) {
  GatewayMetrics metrics({"g0"});
  const ModelMetrics& model = metrics.ForModel("m");
  metrics.RequestEnded(model, absl::StatusCode::kOk, FinishLabel::kEos);
  const std::set<std::string> expected = {"grpc_server_handled_total",
                                          "grpc_server_handling_seconds",
                                          "grpc_server_started_total",
                                          "nibble_build_info",
                                          "nibble_gateway_calls_inflight",
                                          "nibble_gateway_draining",
                                          "nibble_gateway_generated_tokens_total",
                                          "nibble_gateway_inter_token_latency_seconds",
                                          "nibble_gateway_model_ready",
                                          "nibble_gateway_prompt_tokens_total",
                                          "nibble_gateway_queue_depth",
                                          "nibble_gateway_request_duration_seconds",
                                          "nibble_gateway_request_generated_tokens",
                                          "nibble_gateway_request_prompt_tokens",
                                          "nibble_gateway_requests_inflight",
                                          "nibble_gateway_requests_rejected_total",
                                          "nibble_gateway_requests_total",
                                          "nibble_gateway_retries_total",
                                          "nibble_gateway_routing_decisions_total",
                                          "nibble_gateway_stage_duration_seconds",
                                          "nibble_gateway_stream_buffered_bytes",
                                          "nibble_gateway_stream_cancelled_total",
                                          "nibble_gateway_time_to_first_token_seconds",
                                          "nibble_gateway_tokenize_queue_depth",
                                          "nibble_gateway_upstream_streams",
                                          "nibble_gateway_worker_breaker_state",
                                          "nibble_gateway_worker_sequences_inflight",
                                          "nibble_gateway_worker_up"};
  EXPECT_EQ(FamilyNames(metrics), expected);
}

TEST(GatewayMetrics, LabelSetsAreClosed) {
  GatewayMetrics metrics({"g0", "g1"});
  for (int i = 0; i < 1000; ++i) (void)metrics.ForModel(absl::StrCat("model ", i));
  EXPECT_EQ(metrics.ForModel("one more").label, "other");
  EXPECT_EQ(metrics.ForModel("model 3").label, "model 3");
  const size_t before = SeriesCount(metrics);
  for (int i = 0; i < 100'000; ++i) (void)metrics.ForModel(absl::StrCat("x", i));
  EXPECT_EQ(SeriesCount(metrics), before);
  EXPECT_LT(before, 2000U);
}

TEST(GatewayMetrics, CodesHaveTheirNames) {
  EXPECT_STREQ(StatusCodeName(absl::StatusCode::kOk), "OK");
  EXPECT_STREQ(StatusCodeName(absl::StatusCode::kResourceExhausted), "RESOURCE_EXHAUSTED");
  EXPECT_STREQ(StatusCodeName(absl::StatusCode::kUnauthenticated), "UNAUTHENTICATED");
  EXPECT_STREQ(StatusCodeName(static_cast<absl::StatusCode>(77)), "UNKNOWN");
}

}  // namespace
}  // namespace nibble::gateway
