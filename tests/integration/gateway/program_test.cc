// The built nibble-gateway as its supervisor sees it: signals, exit codes, bad flags, no workers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/grpc_status.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "nibble/inference/v1/inference.grpc.pb.h"
#include "tests/integration/gateway/scripted_worker.h"
#include "tests/support/program.h"
#include "tests/unit/services/text/text_files.h"

namespace nibble::gateway {
namespace {

namespace pb = inference::v1;
namespace wire = worker::v1;
using absl::StatusCode;
using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::HasSubstr;
using testing::Program;
using testing::WaitFor;

constexpr char kInference[] = "nibble.inference.v1.InferenceService";

class ProgramTest : public ::testing::Test {
 protected:
  ProgramTest() {
    worker_.info.set_vocab_size(100'000);
    worker_.tokenizer_files = {
        {"tokenizer.json",
         text::testing::ReadText(text::testing::DataPath("byte-level-tokenizer.json"))},
        {"config.json", "{}"}};
    worker_.SetScript([this](ScriptedCall* call) {
      call->Admit();
      call->SayLetters(0, 2);
      if (!call->WaitFor(release_)) return grpc::Status::OK;
      call->SayLetters(2, call->request.max_tokens());
      call->Finish(wire::FINISH_REASON_LENGTH);
      return grpc::Status::OK;
    });
  }

  // In front of the scripted worker, and ready.
  void StartServing(std::vector<std::string> flags = {}) {
    worker_.Start();
    flags.push_back("--groups=" + worker_.address());
    Start(flags);
    ASSERT_TRUE(WaitFor(seconds(20), [this] { return Health(kInference) == "SERVING"; }))
        << gateway_->Errors();
  }
  void Start(std::vector<std::string> flags) {
    flags.push_back("--listen=127.0.0.1:0");
    flags.push_back("--metrics-listen=127.0.0.1:0");
    gateway_ = std::make_unique<Program>("nibble-gateway", flags);
    ASSERT_TRUE(gateway_->AwaitAddresses()) << gateway_->Errors();
    channel_ = grpc::CreateChannel(gateway_->Address("grpc"), grpc::InsecureChannelCredentials());
    stub_ = pb::InferenceService::NewStub(channel_);
  }

  // SERVING, NOT_SERVING, or the code of the failed check.
  std::string Health(const std::string& service) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + seconds(5));
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    grpc::health::v1::HealthCheckResponse response;
    const grpc::Status status =
        grpc::health::v1::Health::NewStub(channel_)->Check(&context, request, &response);
    if (!status.ok()) return absl::StatusCodeToString(FromGrpcStatus(status).code());
    return grpc::health::v1::HealthCheckResponse::ServingStatus_Name(response.status());
  }

  struct Answer {
    absl::Status status;
    uint32_t tokens = 0;
    std::string pushback;
  };
  // One stream of ten tokens to its end; counts itself in `speaking_` with its first delta.
  Answer Generate() {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + seconds(30));
    pb::GenerateStreamRequest request;
    request.mutable_request()->set_text("hello");
    request.mutable_request()->mutable_stopping()->set_max_tokens(10);
    auto reader = stub_->GenerateStream(&context, request);
    Answer answer;
    pb::GenerateStreamResponse event;
    while (reader->Read(&event)) {
      if (!event.has_delta()) continue;
      if (answer.tokens == 0) ++speaking_;
      answer.tokens = event.delta().completion_tokens();
    }
    answer.status = FromGrpcStatus(reader->Finish());
    const auto& trailers = context.GetServerTrailingMetadata();
    const auto pushback = trailers.find("grpc-retry-pushback-ms");
    if (pushback != trailers.end()) {
      answer.pushback.assign(pushback->second.data(), pushback->second.size());
    }
    return answer;
  }
  // A stream under way in a thread of its own, whose first tokens the client has.
  std::thread GenerateBeside(Answer* answer) {
    std::thread client([this, answer] { *answer = Generate(); });
    EXPECT_TRUE(WaitFor(seconds(20), [this] { return speaking_ == 1; })) << gateway_->Errors();
    return client;
  }

  // Starts it with these flags and expects exit code 2, one line that holds `part`, and no port.
  static void ExpectRefused(const std::vector<std::string>& flags, const std::string& part) {
    Program gateway("nibble-gateway", flags);
    EXPECT_EQ(gateway.AwaitExit(seconds(20)), 2) << gateway.Errors();
    const std::string errors = gateway.Errors();
    EXPECT_THAT(errors, HasSubstr(part));
    EXPECT_EQ(std::count(errors.begin(), errors.end(), '\n'), 1) << errors;
    EXPECT_FALSE(std::filesystem::exists(gateway.announcement()));
  }

  ScriptedWorker worker_;
  std::unique_ptr<Program> gateway_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<pb::InferenceService::Stub> stub_;
  std::atomic<bool> release_{false};
  std::atomic<int> speaking_{0};
};

TEST_F(ProgramTest, SigtermFinishesWhatRunsAndExitsZero) {
  StartServing();
  Answer old;
  std::thread client = GenerateBeside(&old);
  gateway_->Signal(SIGTERM);
  EXPECT_TRUE(WaitFor(seconds(10), [this] { return Health(kInference) == "NOT_SERVING"; }));
  EXPECT_EQ(Health(""), "SERVING");  // it lives
  const Answer refused = Generate();
  EXPECT_EQ(refused.status.code(), StatusCode::kUnavailable) << refused.status;
  EXPECT_EQ(ErrorReason(refused.status), "DRAINING");
  EXPECT_TRUE(RetryDelay(refused.status).has_value());
  EXPECT_EQ(gateway_->AwaitExit(milliseconds(300)), std::nullopt);  // waits for the old one
  release_ = true;
  client.join();
  EXPECT_TRUE(old.status.ok()) << old.status;
  EXPECT_EQ(old.tokens, 10U);
  EXPECT_EQ(gateway_->AwaitExit(seconds(10)), 0) << gateway_->Errors();
}

TEST_F(ProgramTest, IdleGatewayEndsWithItsFirstSigterm) {
  StartServing();
  gateway_->Signal(SIGTERM);
  EXPECT_EQ(gateway_->AwaitExit(seconds(10)), 0) << gateway_->Errors();
}

TEST_F(ProgramTest, DrainTimeoutCutsWhatIsLate) {
  StartServing({"--drain-timeout=300ms"});
  Answer old;
  std::thread client = GenerateBeside(&old);
  gateway_->Signal(SIGTERM);
  EXPECT_EQ(gateway_->AwaitExit(seconds(15)), 0) << gateway_->Errors();
  client.join();
  EXPECT_EQ(old.status.code(), StatusCode::kUnavailable) << old.status;
  EXPECT_EQ(ErrorReason(old.status), "DRAINING");
  EXPECT_EQ(old.tokens, 2U);
}

TEST_F(ProgramTest, SecondSigtermEndsItAtOnce) {
  StartServing({"--drain-timeout=1h"});
  Answer old;
  std::thread client = GenerateBeside(&old);
  gateway_->Signal(SIGTERM);
  EXPECT_TRUE(WaitFor(seconds(10), [this] { return Health(kInference) == "NOT_SERVING"; }));
  gateway_->Signal(SIGTERM);
  EXPECT_EQ(gateway_->AwaitExit(seconds(10)), 1) << gateway_->Errors();
  client.join();
  EXPECT_EQ(old.status.code(), StatusCode::kUnavailable) << old.status;
}

TEST_F(ProgramTest, BadFlagsAreRefusedBeforeAnyPortIsOpened) {
  // The port is taken: whoever opened it first would complain of that.
  worker_.Start();
  const std::string taken = "--listen=" + worker_.address();
  const std::string group = "--groups=127.0.0.1:1";
  ExpectRefused({taken, group, "--max-concurrency=0"}, "max-concurrency");
  ExpectRefused({taken, group, "--stall-timeout=never"}, "stall-timeout");
  ExpectRefused({taken, group, "--log-level=loud"}, "log-level");
  ExpectRefused({taken, group, "--no-such-flag"}, "no-such-flag");
  ExpectRefused({taken, "--groups=nowhere"}, "nowhere");
  ExpectRefused({taken, group, group}, "twice");
  ExpectRefused({taken, group, "--metrics-listen=here"}, "metrics_listen");
  ExpectRefused({taken}, "groups");
}

TEST_F(ProgramTest, PortsThatAreTakenAreToldByTheirKey) {
  worker_.Start();
  const std::string group = "--groups=127.0.0.1:1";
  const std::string any = "127.0.0.1:0";
  ExpectRefused({group, "--metrics-listen=" + any, "--listen=" + worker_.address()},
                "listen \"" + worker_.address());
  ExpectRefused({group, "--listen=" + any, "--metrics-listen=" + worker_.address()},
                "metrics_listen \"" + worker_.address());
  ExpectRefused(
      {group, "--listen=" + any, "--metrics-listen=" + any, "--admin-listen=" + worker_.address()},
      "admin_listen \"" + worker_.address());
}

TEST_F(ProgramTest, WithoutAWorkerItLivesIsNotReadyAndSaysWhenToComeBack) {
  Start({"--groups=unix:/nonexistent/worker.sock,127.0.0.1:1"});
  EXPECT_EQ(Health(""), "SERVING");
  EXPECT_EQ(Health(kInference), "NOT_SERVING");
  EXPECT_EQ(Health("nibble.inference.v1.ModelService"), "NOT_SERVING");
  const Answer refused = Generate();
  EXPECT_EQ(refused.status.code(), StatusCode::kUnavailable) << refused.status;
  EXPECT_EQ(ErrorReason(refused.status), "NO_WORKER");
  ASSERT_TRUE(RetryDelay(refused.status).has_value());
  EXPECT_GE(*RetryDelay(refused.status), milliseconds(500));
  EXPECT_LE(*RetryDelay(refused.status), milliseconds(2000));
  EXPECT_EQ(refused.pushback, std::to_string(*RetryDelay(refused.status) / milliseconds(1)));
  httplib::Client http("http://" + gateway_->Address("metrics"));
  const auto live = http.Get("/healthz");
  const auto ready = http.Get("/readyz");
  ASSERT_TRUE(live && ready);
  EXPECT_EQ(live->status, 200);
  EXPECT_EQ(ready->status, 503);
  gateway_->Signal(SIGTERM);
  EXPECT_EQ(gateway_->AwaitExit(seconds(10)), 0) << gateway_->Errors();
}

// Started before its worker, as a deployment may do.
TEST_F(ProgramTest, WorkerThatComesLaterIsTakenUp) {
  worker_.Start();
  const std::string address = worker_.address();
  worker_.Stop();
  Start({"--groups=" + address});
  EXPECT_EQ(Health(kInference), "NOT_SERVING");
  worker_.Start(address);
  release_ = true;
  EXPECT_TRUE(WaitFor(seconds(20), [this] { return Health(kInference) == "SERVING"; }));
  EXPECT_TRUE(Generate().status.ok());
}

}  // namespace
}  // namespace nibble::gateway
