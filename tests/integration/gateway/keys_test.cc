// Keys, what they may do, and that nothing is left that asks for none.
#include <google/protobuf/descriptor.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "nibble/admin/v1/admin.grpc.pb.h"
#include "tests/integration/gateway/gateway_fixture.h"

namespace nibble::gateway {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kKey[] = "nbl_the-key-of-alice";
constexpr char kOperatorKey[] = "nbl_the-key-of-an-operator";
constexpr char kOtherKey[] = "nbl_the-key-of-bob";

class KeysTest : public GatewayFixture {
 protected:
  ~KeysTest() override { std::filesystem::remove(path_); }

  static std::string Line(const std::string& id, const std::string& key, const std::string& more) {
    return id + " = { sha256 = \"" + HexOf(HashOf(key)) + "\", " + more + " }\n";
  }

  // A gateway with an admin port; alice's key has `more`.
  void StartWithKeys(const std::string& more = "", const std::string& tenants = "",
                     size_t groups = 1) {
    std::ofstream(path_) << "[keys]\n"
                         << Line("alice-1", kKey, "tenant = \"alice\"" + more)
                         << Line("bob-1", kOtherKey, "tenant = \"bob\", priority = \"high\"")
                         << Line("op-1", kOperatorKey, "tenant = \"ops\", admin = true") << tenants;
    GatewayOptions options;
    options.keys_file = path_;
    options.admin_listen = "127.0.0.1:0";
    StartWith(groups, std::move(options));
    admin_channel_ =
        grpc::CreateChannel(server_->admin_address(), grpc::InsecureChannelCredentials());
  }

  // Any method with any bytes; the key is left out where it is empty.
  static Transcript CallBytes(const std::shared_ptr<grpc::Channel>& channel,
                              const std::string& method, const std::string& key) {
    grpc::GenericStub generic(channel);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    if (!key.empty()) context.AddMetadata("authorization", "Bearer " + key);
    grpc::CompletionQueue queue;
    const grpc::Slice nothing;
    const grpc::ByteBuffer request(&nothing, 1);
    auto call = generic.PrepareUnaryCall(&context, method, request, &queue);
    call->StartCall();
    grpc::ByteBuffer response;
    grpc::Status status;
    call->Finish(&response, &status, &status);
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    Transcript transcript;
    TakeEnd(status, context, &transcript);
    return transcript;
  }

  Transcript Ask(const std::string& key, uint32_t max_tokens = 3, const std::string& model = "",
                 const std::string& text = "x") {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    if (!key.empty()) context.AddMetadata("authorization", "Bearer " + key);
    pb::GenerateStreamRequest request = Request(text, max_tokens);
    request.mutable_request()->set_model(model);
    auto reader = stub_->GenerateStream(&context, request);
    Transcript transcript;
    pb::GenerateStreamResponse response;
    while (reader->Read(&response)) Take(response, &transcript);
    TakeEnd(reader->Finish(), context, &transcript);
    return transcript;
  }

  double Rejected(Rejection why) {
    return server_->core().metrics.rejected[static_cast<size_t>(why)]->Value();
  }

  const std::string path_ = ::testing::TempDir() + "/keys-" + std::to_string(getpid());
  std::shared_ptr<grpc::Channel> admin_channel_;
};

// The methods are read off the contracts: one that is added is asked for too.
TEST_F(KeysTest, EveryMethodWantsAKey) {
  StartWithKeys();
  const google::protobuf::ServiceDescriptor* const services[] = {
      pb::GenerateRequest::descriptor()->file()->FindServiceByName("InferenceService"),
      pb::GenerateRequest::descriptor()->file()->FindServiceByName("ModelService"),
      admin::v1::DrainRequest::descriptor()->file()->FindServiceByName("AdminService")};
  int methods = 0;
  for (const auto* service : services) {
    const bool is_admin = service->name() == "AdminService";
    for (int i = 0; i < service->method_count(); ++i, ++methods) {
      const std::string method =
          absl::StrCat("/", service->full_name(), "/", service->method(i)->name());
      const auto& channel = is_admin ? admin_channel_ : channel_;
      for (const char* key : {"", "nbl_unknown"}) {
        const Transcript answer = CallBytes(channel, method, key);
        EXPECT_EQ(answer.status.code(), absl::StatusCode::kUnauthenticated) << method << key;
        EXPECT_EQ(ErrorReason(answer.status), reason::kUnauthenticated) << method << key;
        EXPECT_THAT(std::string(answer.status.message()), Not(HasSubstr("unknown"))) << method;
      }
      const Transcript known = CallBytes(channel, method, is_admin ? kOperatorKey : kKey);
      EXPECT_NE(known.status.code(), absl::StatusCode::kUnauthenticated) << method;
      EXPECT_NE(known.status.code(), absl::StatusCode::kUnimplemented) << method;
    }
  }
  EXPECT_GE(methods, 12);
  EXPECT_EQ(server_->core().calls.size(), 0u);
}

TEST_F(KeysTest, HealthAsksForNoneAndReflectionIsOff) {
  StartWithKeys();
  EXPECT_TRUE(CallBytes(channel_, "/grpc.health.v1.Health/Check", "").status.ok());
  for (const auto& channel : {channel_, admin_channel_}) {
    for (const char* version : {"v1", "v1alpha"}) {
      const std::string method =
          std::string("/grpc.reflection.") + version + ".ServerReflection/ServerReflectionInfo";
      EXPECT_EQ(CallBytes(channel, method, kKey).status.code(), absl::StatusCode::kUnimplemented);
    }
  }
}

TEST_F(KeysTest, AnOrdinaryKeyIsNotAnOperators) {
  StartWithKeys();
  const std::string service = "/nibble.admin.v1.AdminService/";
  for (const char* method : {"GetServerInfo", "Drain", "Undrain", "SetLogLevel"}) {
    const Transcript answer = CallBytes(admin_channel_, service + method, kKey);
    EXPECT_EQ(answer.status.code(), absl::StatusCode::kPermissionDenied) << method;
    EXPECT_EQ(ErrorReason(answer.status), reason::kPermissionDenied);
  }
  EXPECT_FALSE(server_->core().draining.load());
  EXPECT_TRUE(CallBytes(admin_channel_, service + "GetServerInfo", kOperatorKey).status.ok());
}

TEST_F(KeysTest, TheGroupIsToldWhoAsks) {
  StartWithKeys();
  EXPECT_TRUE(Ask(kKey).status.ok());
  EXPECT_TRUE(Ask(kOtherKey).status.ok());
  const auto requests = workers_[0]->requests();
  ASSERT_EQ(requests.size(), 2u);
  EXPECT_EQ(requests[0].tenant(), "alice");
  EXPECT_EQ(requests[0].priority(), worker::v1::PRIORITY_NORMAL);
  EXPECT_EQ(requests[1].tenant(), "bob");
  EXPECT_EQ(requests[1].priority(), worker::v1::PRIORITY_HIGH);
  EXPECT_NE(requests[0].prefix_salt(), requests[1].prefix_salt());
}

TEST_F(KeysTest, WithoutKeysNobodyIsATenant) {
  StartWith(1);
  EXPECT_TRUE(Ask("").status.ok());
  EXPECT_TRUE(Ask(kKey).status.ok());  // shown to nobody
  EXPECT_EQ(workers_[0]->requests()[0].tenant(), "");
  EXPECT_EQ(workers_[0]->requests()[0].prefix_salt(), "");
}

TEST_F(KeysTest, AModelThatIsNotAllowedIsRefusedWhetherItIsServedOrNot) {
  StartWithKeys(", models = [\"other\"]");
  for (const char* model : {"m", "nowhere", ""}) {
    const Transcript answer = Ask(kKey, 3, model);
    EXPECT_EQ(answer.status.code(), absl::StatusCode::kPermissionDenied) << model;
  }
  EXPECT_EQ(Ask(kKey, 3, "other").status.code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(Ask(kOtherKey, 3, "m").status.ok());
  EXPECT_EQ(Rejected(Rejection::kForbidden), 3);

  const auto list = [&](const std::string& key) {
    grpc::ClientContext context;
    context.AddMetadata("authorization", "Bearer " + key);
    pb::ListModelsResponse response;
    EXPECT_TRUE(model_stub_->ListModels(&context, {}, &response).ok());
    return response.models_size();
  };
  EXPECT_EQ(list(kKey), 0);
  EXPECT_EQ(list(kOtherKey), 1);
}

TEST_F(KeysTest, RequestsInFlightAreBoundedByKey) {
  StartWithKeys(", max_requests = 1");
  std::atomic<bool> go_on{false};
  workers_[0]->SetScript([&](ScriptedCall* call) {
    call->Admit();
    call->SayLetters(0, 1);
    (void)call->WaitFor(go_on);
    call->Finish(worker::v1::FINISH_REASON_LENGTH);
    return grpc::Status::OK;
  });
  std::thread first([&] { EXPECT_TRUE(Ask(kKey).status.ok()); });
  EXPECT_TRUE(WaitUntil([&] { return workers_[0]->active() == 1; }));
  const Transcript second = Ask(kKey);
  EXPECT_EQ(second.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(second.status), reason::kQuota);
  EXPECT_EQ(second.trailers.at("grpc-retry-pushback-ms"), "-1");
  std::thread others([&] { EXPECT_TRUE(Ask(kOtherKey).status.ok()); });
  EXPECT_TRUE(WaitUntil([&] { return workers_[0]->active() == 2; }));
  go_on = true;
  first.join();
  others.join();
  EXPECT_TRUE(Ask(kKey).status.ok());  // given back
}

// Whoever has seen a call's end may begin the next: its place is back by then.
TEST_F(KeysTest, OnePlaceIsEnoughForCallsOneAfterTheOther) {
  StartWithKeys(", max_requests = 1");
  for (int i = 0; i < 200; ++i) {
    const Transcript answer = Ask(kKey);
    ASSERT_TRUE(answer.status.ok()) << i << ": " << answer.status;
    grpc::ClientContext context;
    context.AddMetadata("authorization", absl::StrCat("Bearer ", kKey));
    pb::ListModelsResponse models;
    const grpc::Status listed = model_stub_->ListModels(&context, {}, &models);
    ASSERT_TRUE(listed.ok()) << i << ": " << listed.error_message();
  }
}

TEST_F(KeysTest, TokensAreChargedToTheTenant) {
  StartWithKeys("", "[tenants]\nalice = { tokens_per_minute = 6 }\n");
  EXPECT_TRUE(Ask(kKey, 3).status.ok());  // 2 and 3: one is left
  EXPECT_TRUE(Ask(kKey, 3).status.ok());  // overdrawn by four
  const Transcript refused = Ask(kKey, 3);
  EXPECT_EQ(refused.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(refused.status), reason::kQuota);
  const auto delay = RetryDelay(refused.status);
  ASSERT_TRUE(delay.has_value());
  EXPECT_GT(*delay, std::chrono::seconds(40));
  EXPECT_LE(*delay, std::chrono::seconds(50));
  EXPECT_GT(std::stoi(refused.trailers.at("grpc-retry-pushback-ms")), 40000);
  EXPECT_TRUE(Ask(kOtherKey, 3).status.ok());
  EXPECT_EQ(Rejected(Rejection::kQuota), 1);
  const TenantMetrics tokens = server_->core().metrics.ForTenant("alice");
  EXPECT_EQ(tokens.prompt_tokens->Value(), 4);
  EXPECT_EQ(tokens.generated_tokens->Value(), 6);
  EXPECT_EQ(workers_[0]->requests().size(), 3u);
}

TEST_F(KeysTest, TheQueueIsCountedByPriority) {
  StartWithKeys();
  std::atomic<bool> go_on{false};
  workers_[0]->SetScript([&](ScriptedCall* call) {
    (void)call->WaitFor(go_on);
    return SpeakLetters()(call);
  });
  const auto depth = [&](Priority priority) {
    return server_->core()
        .metrics.ForModel("m")
        .queue_depth[static_cast<size_t>(priority)]
        ->Value();
  };
  std::thread call([&] { EXPECT_TRUE(Ask(kOtherKey).status.ok()); });
  EXPECT_TRUE(WaitUntil([&] { return depth(Priority::kHigh) == 1; }));
  EXPECT_EQ(depth(Priority::kNormal), 0);
  go_on = true;
  call.join();
  EXPECT_EQ(depth(Priority::kHigh), 0);
}

TEST_F(KeysTest, ABadFileIsRefusedAtTheStart) {
  GatewayOptions options;
  options.listen = "127.0.0.1:0";
  options.keys_file = path_;
  options.groups = {"127.0.0.1:1"};
  const auto missing = GatewayServer::Start(options);
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(missing.status().message()), HasSubstr(path_));
}

}  // namespace
}  // namespace nibble::gateway
