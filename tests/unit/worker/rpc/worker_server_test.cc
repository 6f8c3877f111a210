#include "worker/rpc/worker_server.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/unit/worker/rpc/fake_engine.h"

namespace nibble::rpc {
namespace {

using grpc::health::v1::HealthCheckResponse;

class WorkerServerTest : public testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<WorkerServer>> Start(const std::string& address) {
    WorkerServerOptions options;
    const auto listen = ParseListenAddress(address);
    if (!listen.ok()) return listen.status();
    options.listen = *listen;
    options.service.engine = &engine_;
    options.service.clock = &clock_;
    options.service.stats = &stats_;
    options.service.tokenizer_files = &files_;
    options.service.limits = {.vocab_size = 100, .max_context = 100};
    return WorkerServer::Start(std::move(options));
  }

  HealthCheckResponse::ServingStatus Health(const WorkerServer& server,
                                            const std::string& service) {
    auto stub = grpc::health::v1::Health::NewStub(
        grpc::CreateChannel(server.address(), grpc::InsecureChannelCredentials()));
    grpc::ClientContext context;
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    HealthCheckResponse response;
    const grpc::Status status = stub->Check(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.status();
  }

  FakeEngine engine_;
  SteadyClock clock_;
  step::EngineStats stats_;
  TokenizerFiles files_{{}};
};

constexpr char kService[] = "nibble.worker.v1.WorkerService";

TEST_F(WorkerServerTest, ReadinessFollowsTheEngineAndLivenessDoesNot) {
  const auto server = Start("127.0.0.1:0");
  ASSERT_TRUE(server.ok()) << server.status();
  EXPECT_EQ(Health(**server, ""), HealthCheckResponse::SERVING);
  EXPECT_EQ(Health(**server, kService), HealthCheckResponse::SERVING);
  (*server)->Drain();
  EXPECT_EQ(Health(**server, ""), HealthCheckResponse::SERVING);
  EXPECT_EQ(Health(**server, kService), HealthCheckResponse::NOT_SERVING);
}

TEST_F(WorkerServerTest, ADrainByRpcShowsInTheHealthAtOnce) {
  const auto server = Start("127.0.0.1:0");
  ASSERT_TRUE(server.ok()) << server.status();
  auto stub = worker::v1::WorkerService::NewStub(
      grpc::CreateChannel((*server)->address(), grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  worker::v1::DrainResponse response;
  ASSERT_TRUE(stub->Drain(&context, {}, &response).ok());
  EXPECT_EQ(Health(**server, kService), HealthCheckResponse::NOT_SERVING);
}

TEST_F(WorkerServerTest, RefusesATcpPortThatIsTaken) {
  const auto first = Start("127.0.0.1:0");
  ASSERT_TRUE(first.ok());
  const auto second = Start((*first)->address());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(second.status().message()), testing::HasSubstr((*first)->address()));
}

class UnixSocketTest : public WorkerServerTest {
 protected:
  UnixSocketTest() : folder_(testing::TempDir() + "/worker-server-" + std::to_string(::getpid())) {
    std::filesystem::create_directories(folder_);
  }
  ~UnixSocketTest() override { std::filesystem::remove_all(folder_); }
  const std::string folder_;
};

TEST_F(UnixSocketTest, ServesAndRefusesASecondServer) {
  const std::string address = "unix:" + folder_ + "/leader";
  auto first = Start(address);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ((*first)->address(), address);
  EXPECT_EQ(Health(**first, kService), HealthCheckResponse::SERVING);
  EXPECT_EQ(Start(address).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Health(**first, kService), HealthCheckResponse::SERVING);  // still the first one's
  first->reset();
  EXPECT_TRUE(Start(address).ok());  // what the first one left behind is no obstacle
}

TEST_F(UnixSocketTest, LeavesAFileOfThatNameAlone) {
  const std::string path = folder_ + "/precious";
  std::ofstream(path) << "data";
  EXPECT_EQ(Start("unix:" + path).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(std::filesystem::file_size(path), 4u);
}

TEST(ListenAddress, RefusesWhatIsNoAddress) {
  EXPECT_FALSE(ParseListenAddress("unix:").ok());
  EXPECT_FALSE(ParseListenAddress("unix:" + std::string(108, 'x')).ok());
  EXPECT_TRUE(ParseListenAddress("unix:" + std::string(107, 'x')).ok());
  EXPECT_FALSE(ParseListenAddress("50052").ok());
  EXPECT_FALSE(CheckAvailable({.unix_path = "/nonexistent/socket"}).ok());
  EXPECT_FALSE(CheckAvailable({.host = "host.invalid", .port = 1}).ok());
  EXPECT_FALSE(CheckAvailable({.host = "203.0.113.1", .port = 0}).ok());  // not this machine's
}

}  // namespace
}  // namespace nibble::rpc
