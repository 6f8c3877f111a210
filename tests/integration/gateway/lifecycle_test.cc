// Health, draining, the operators' port, metrics: the gateway as a process that others watch.
#include <gmock/gmock.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "nibble/admin/v1/admin.grpc.pb.h"
#include "tests/integration/gateway/gateway_fixture.h"

namespace nibble::gateway {
namespace {

namespace wire = worker::v1;
using absl::StatusCode;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using ::testing::HasSubstr;

constexpr char kInference[] = "nibble.inference.v1.InferenceService";

class LifecycleTest : public GatewayFixture {
 protected:
  // SERVING, NOT_SERVING, or the code of the failed check.
  std::string Health(const std::string& service) {
    auto stub = grpc::health::v1::Health::NewStub(channel_);
    grpc::ClientContext context;
    HealthCheckRequest request;
    request.set_service(service);
    HealthCheckResponse response;
    const grpc::Status status = stub->Check(&context, request, &response);
    if (!status.ok()) return absl::StatusCodeToString(FromGrpcStatus(status).code());
    return HealthCheckResponse::ServingStatus_Name(response.status());
  }
  // A call that speaks until `release_` is set.
  Script SpeakUntilReleased() {
    return [this](ScriptedCall* call) {
      call->Admit();
      call->SayLetters(0, 2);
      EXPECT_TRUE(WaitUntil([&] { return release_.load(); }));
      call->SayLetters(2, call->request.max_tokens());
      call->Finish(wire::FINISH_REASON_LENGTH);
      return grpc::Status::OK;
    };
  }

  std::atomic<bool> release_{false};
};

TEST_F(LifecycleTest, HealthFollowsTheGroups) {
  StartWith(1);
  EXPECT_TRUE(WaitUntil([&] { return Health(kInference) == "SERVING"; }));
  EXPECT_EQ(Health(""), "SERVING");
  EXPECT_EQ(Health("nibble.inference.v1.ModelService"), "SERVING");
  EXPECT_EQ(Health("model/m"), "SERVING");
  EXPECT_EQ(Health("model/x"), "NOT_FOUND");
  workers_[0]->Stop();
  EXPECT_TRUE(WaitUntil([&] { return Health(kInference) == "NOT_SERVING"; }));
  EXPECT_TRUE(WaitUntil([&] { return Health("model/m") == "NOT_SERVING"; }));
  EXPECT_EQ(Health(""), "SERVING");
}

TEST_F(LifecycleTest, WatchTellsEachChange) {
  StartWith(1);
  ASSERT_TRUE(WaitUntil([&] { return Health(kInference) == "SERVING"; }));
  auto stub = grpc::health::v1::Health::NewStub(channel_);
  grpc::ClientContext context;
  HealthCheckRequest request;
  request.set_service(kInference);
  auto reader = stub->Watch(&context, request);
  HealthCheckResponse response;
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);
  server_->SetDraining(true);
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);
  server_->SetDraining(false);
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);
  context.TryCancel();
  while (reader->Read(&response)) {
  }
  (void)reader->Finish();
}

TEST_F(LifecycleTest, DrainRefusesNewWorkAndFinishesTheOld) {
  StartWith(1);
  workers_[0]->SetScript(SpeakUntilReleased());
  Transcript old;
  std::thread client([&] { old = Run(Request("hello", 10)); });
  ASSERT_TRUE(WaitUntil([&] { return workers_[0]->active() == 1; }));
  server_->SetDraining(true);
  EXPECT_EQ(Health(kInference), "NOT_SERVING");
  EXPECT_EQ(Health("model/m"), "NOT_SERVING");
  EXPECT_EQ(Health(""), "SERVING");
  const Transcript refused = Run(Request("hello", 10));
  EXPECT_EQ(refused.status.code(), StatusCode::kUnavailable);
  EXPECT_EQ(ErrorReason(refused.status), "DRAINING");
  EXPECT_TRUE(RetryDelay(refused.status).has_value());
  release_ = true;
  client.join();
  EXPECT_TRUE(old.status.ok()) << old.status;
  EXPECT_EQ(old.text.at(0), LettersOf(7, 10));
  server_->SetDraining(false);
  EXPECT_TRUE(Run(Request("hello", 10)).status.ok());
}

TEST_F(LifecycleTest, ShutdownWaitsForWhatIsRunning) {
  StartWith(1);
  workers_[0]->SetScript(SpeakUntilReleased());
  Transcript old;
  std::thread client([&] { old = Run(Request("hello", 10)); });
  ASSERT_TRUE(WaitUntil([&] { return workers_[0]->active() == 1; }));
  std::thread releaser([&] {
    EXPECT_TRUE(WaitUntil([&] { return server_->core().draining.load(); }));
    release_ = true;
  });
  EXPECT_EQ(server_->Shutdown(std::chrono::seconds(20)), 0U);
  releaser.join();
  client.join();
  EXPECT_TRUE(old.status.ok()) << old.status;
}

TEST_F(LifecycleTest, WhatIsLateInADrainIsCutUnavailable) {
  StartWith(1);
  workers_[0]->SetScript(SpeakUntilReleased());
  Transcript old;
  std::thread client([&] { old = Run(Request("hello", 10)); });
  ASSERT_TRUE(WaitUntil([&] { return workers_[0]->active() == 1; }));
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(server_->Shutdown(std::chrono::milliseconds(100)), 1U);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(8));
  release_ = true;
  client.join();
  EXPECT_EQ(old.status.code(), StatusCode::kUnavailable) << old.status;
  EXPECT_EQ(ErrorReason(old.status), "DRAINING");
  EXPECT_EQ(old.text.at(0), LettersOf(7, 2));
  EXPECT_EQ(old.trailers.at("x-tokens-sent"), "2");
}

TEST_F(LifecycleTest, HurryCutsADrainShort) {
  StartWith(1);
  workers_[0]->SetScript(SpeakUntilReleased());
  Transcript old;
  std::thread client([&] { old = Run(Request("hello", 10)); });
  ASSERT_TRUE(WaitUntil([&] { return workers_[0]->active() == 1; }));
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(server_->Shutdown(std::chrono::seconds(60), [] { return true; }), 1U);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(8));
  release_ = true;
  client.join();
  EXPECT_EQ(old.status.code(), StatusCode::kUnavailable);
}

TEST_F(LifecycleTest, AdminPortShowsAndDrains) {
  GatewayOptions options;
  options.admin_listen = "127.0.0.1:0";
  StartWith(1, options);
  auto stub = admin::v1::AdminService::NewStub(
      grpc::CreateChannel(server_->admin_address(), grpc::InsecureChannelCredentials()));
  {
    grpc::ClientContext context;
    admin::v1::GetServerInfoResponse info;
    ASSERT_TRUE(stub->GetServerInfo(&context, {}, &info).ok());
    EXPECT_EQ(info.program(), "nibble-gateway");
    ASSERT_EQ(info.groups_size(), 1);
    EXPECT_EQ(info.groups(0).address(), workers_[0]->address());
    EXPECT_TRUE(info.groups(0).ready());
    EXPECT_EQ(info.groups(0).model(), "m");
  }
  {
    grpc::ClientContext context;
    admin::v1::GetMemoryPlanResponse plan;
    ASSERT_TRUE(stub->GetMemoryPlan(&context, {}, &plan).ok());
    ASSERT_EQ(plan.groups_size(), 1);
    EXPECT_EQ(plan.groups(0).address(), workers_[0]->address());
    ASSERT_EQ(plan.groups(0).ranks_size(), 1);
    EXPECT_EQ(plan.groups(0).ranks(0).weights_bytes(), 1234U);
  }
  {
    grpc::ClientContext context;
    admin::v1::DrainResponse response;
    ASSERT_TRUE(stub->Drain(&context, {}, &response).ok());
    EXPECT_EQ(response.remaining(), 0U);
    EXPECT_EQ(ErrorReason(Run(Request("hello", 3)).status), "DRAINING");
  }
  {
    grpc::ClientContext context;
    admin::v1::UndrainResponse response;
    ASSERT_TRUE(stub->Undrain(&context, {}, &response).ok());
    EXPECT_TRUE(Run(Request("hello", 3)).status.ok());
  }
  grpc::ClientContext context;
  admin::v1::SetLogLevelRequest request;
  request.set_level("loud");
  admin::v1::SetLogLevelResponse response;
  EXPECT_EQ(stub->SetLogLevel(&context, request, &response).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(LifecycleTest, AdminIsNotOnThePublicPort) {
  StartWith(1);
  EXPECT_EQ(RunBytes("/nibble.admin.v1.AdminService/Drain", "").status.code(),
            StatusCode::kUnimplemented);
}

// Value of the first series that begins with `name`, or -1.
double Metric(const std::string& text, const std::string& name) {
  for (const auto line : absl::StrSplit(text, '\n')) {
    const std::string series(line);
    if (series.starts_with(name)) return std::stod(series.substr(series.rfind(' ') + 1));
  }
  return -1;
}

TEST_F(LifecycleTest, MetricsCountExactlyWhatHappened) {
  GatewayOptions options;
  options.metrics_listen = "127.0.0.1:0";
  StartWith(1, options);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Run(Request("hello", 10)).status.ok());
  (void)Run(Request("", 10));
  ExpectIdle();
  httplib::Client client("http://" + server_->metrics_address());
  std::string text;
  ASSERT_TRUE(WaitUntil([&] {
    text = client.Get("/metrics")->body;
    return Metric(text, "nibble_gateway_worker_up{worker=\"g0\"}") == 1;
  }));
  const std::string method =
      "{grpc_code=\"OK\",grpc_method=\"GenerateStream\",grpc_service=\"" + std::string(kInference);
  EXPECT_EQ(Metric(text, "grpc_server_handled_total" + method), 3);
  EXPECT_EQ(Metric(text, "nibble_gateway_generated_tokens_total{model=\"m\"}"), 30);
  EXPECT_EQ(Metric(text, "nibble_gateway_prompt_tokens_total{model=\"m\"}"), 18);
  EXPECT_EQ(Metric(text, "nibble_gateway_requests_total{code=\"OK\",finish_reason=\"length\""), 3);
  EXPECT_EQ(Metric(text, "nibble_gateway_requests_rejected_total{reason=\"invalid\"}"), 1);
  EXPECT_EQ(Metric(text, "nibble_gateway_inter_token_latency_seconds_count{model=\"m\"}"), 27);
  EXPECT_EQ(Metric(text, "nibble_gateway_requests_inflight{model=\"m\"}"), 0);
  EXPECT_EQ(client.Get("/healthz")->status, 200);
  EXPECT_EQ(client.Get("/readyz")->status, 200);
  server_->SetDraining(true);
  EXPECT_EQ(client.Get("/healthz")->status, 200);
  EXPECT_EQ(client.Get("/readyz")->status, 503);
}

// Between two ticks, too: `nibble serve` and probes of either kind go by what they are told first.
TEST_F(LifecycleTest, WhatReadyzSaysTheHealthServiceSaysToo) {
  GatewayOptions options;
  options.metrics_listen = "127.0.0.1:0";
  options.tick = std::chrono::seconds(1);
  StartWith(1, options);
  httplib::Client client("http://" + server_->metrics_address());
  ASSERT_EQ(client.Get("/readyz")->status, 200);
  EXPECT_EQ(Health(std::string(kInference)), "SERVING");
}

TEST_F(LifecycleTest, PromtoolFindsNothingToSay) {
  if (std::system("promtool --version >/dev/null 2>&1") != 0) {
    std::fprintf(stderr, "NOT RUN: PromtoolFindsNothingToSay (no promtool)\n");
    return;
  }
  GatewayOptions options;
  options.metrics_listen = "127.0.0.1:0";
  StartWith(1, options);
  ASSERT_TRUE(Run(Request("hello", 10)).status.ok());
  httplib::Client client("http://" + server_->metrics_address());
  const std::string path = ::testing::TempDir() + absl::StrCat("gateway_metrics_", ::getpid());
  std::ofstream(path) << client.Get("/metrics")->body;
  EXPECT_EQ(std::system(("promtool check metrics < " + path).c_str()), 0);
}

TEST_F(LifecycleTest, NothingOfAPromptIsInTheMetrics) {
  GatewayOptions options;
  options.metrics_listen = "127.0.0.1:0";
  StartWith(1, options);
  pb::GenerateStreamRequest request = Request("CANARY-PROMPT", 3);
  ASSERT_TRUE(Run(request).status.ok());
  request.mutable_request()->set_model("CANARY-MODEL");
  request.mutable_request()->set_request_id("CANARY-ID");
  EXPECT_FALSE(Run(request).status.ok());
  httplib::Client client("http://" + server_->metrics_address());
  EXPECT_THAT(client.Get("/metrics")->body, ::testing::Not(HasSubstr("CANARY")));
}

TEST_F(LifecycleTest, PortThatIsTakenIsToldByItsKey) {
  StartWith(1);
  GatewayOptions options;
  options.listen = server_->address();
  const auto second = GatewayServer::Start(options);
  EXPECT_EQ(second.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("listen"));
}

TEST_F(LifecycleTest, ListensOnAUnixSocket) {
  workers_.push_back(std::make_unique<ScriptedWorker>());
  const std::string path = ::testing::TempDir() + absl::StrCat("gateway_worker_", ::getpid());
  workers_[0]->Start("unix:" + path);
  GatewayOptions options;
  options.groups = {"unix:" + path};
  StartGateway(options);
  ASSERT_TRUE(WaitUntil([&] { return ReadyGroups() == 1; }));
  EXPECT_TRUE(Run(Request("hello", 10)).status.ok());
}

}  // namespace
}  // namespace nibble::gateway
