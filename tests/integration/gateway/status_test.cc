// Every row of the status contract, seen by a client.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "absl/strings/numbers.h"
#include "google/rpc/error_details.pb.h"
#include "tests/integration/gateway/gateway_fixture.h"

namespace nibble::gateway {
namespace {

namespace wire = worker::v1;
using absl::StatusCode;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

class StatusTest : public GatewayFixture {
 protected:
  static std::vector<std::string> BadFields(const absl::Status& status) {
    std::vector<std::string> fields;
    for (const auto& violation : FieldViolations(status)) fields.push_back(violation.field);
    return fields;
  }
  int Pushback(const Transcript& transcript) {
    int value = 0;
    EXPECT_TRUE(absl::SimpleAtoi(transcript.trailers.at("grpc-retry-pushback-ms"), &value));
    return value;
  }
  size_t Attempts() const {
    size_t attempts = 0;
    for (const auto& worker : workers_) attempts += worker->requests().size();
    return attempts;
  }
};

TEST_F(StatusTest, BadFieldsAreAllNamed) {
  StartWith(1);
  pb::GenerateStreamRequest request = Request("", 5);
  request.mutable_request()->mutable_sampling()->set_n(0xFFFFFFFF);
  request.mutable_request()->mutable_output()->set_logprobs(1'000'000);
  const Transcript got = Run(request);
  EXPECT_EQ(got.status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorReason(got.status), "INVALID_PARAMETER");
  EXPECT_THAT(BadFields(got.status),
              ElementsAre("request.text", "request.sampling.n", "request.output.logprobs"));
  EXPECT_FALSE(got.trailers.contains("grpc-retry-pushback-ms"));
  EXPECT_EQ(Attempts(), 0U);
}

TEST_F(StatusTest, MoreThanTheContextIsInvalid) {
  StartWith(1);
  const Transcript huge = Run(Request("hello", 0x7FFFFFFF));
  EXPECT_EQ(huge.status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(ErrorReason(huge.status), "CONTEXT_LENGTH_EXCEEDED");
  EXPECT_THAT(BadFields(huge.status), ElementsAre("request.stopping.max_tokens"));
  const Transcript past_int = Run(Request("hello", 0x80000000));
  EXPECT_EQ(past_int.status.code(), StatusCode::kInvalidArgument);
  const Transcript long_prompt = Run(Request(std::string(600, 'x'), 1));
  EXPECT_EQ(ErrorReason(long_prompt.status), "CONTEXT_LENGTH_EXCEEDED");
  EXPECT_THAT(BadFields(long_prompt.status), ElementsAre("request.text"));
}

TEST_F(StatusTest, UnknownModelIsNotFoundWithItsResource) {
  StartWith(1);
  pb::GenerateStreamRequest request = Request("hello", 5);
  request.mutable_request()->set_model("gpt");
  const Transcript got = Run(request);
  EXPECT_EQ(got.status.code(), StatusCode::kNotFound);
  EXPECT_EQ(ErrorReason(got.status), "MODEL_NOT_FOUND");
  google::rpc::ResourceInfo info;
  const auto payload = got.status.GetPayload("type.googleapis.com/google.rpc.ResourceInfo");
  ASSERT_TRUE(payload.has_value());
  ASSERT_TRUE(info.ParseFromString(std::string(*payload)));
  EXPECT_EQ(info.resource_type(), "model");
  EXPECT_EQ(info.resource_name(), "gpt");
}

TEST_F(StatusTest, WorkersRefusalIsNotRetried) {
  StartWith(2);
  for (auto& worker : workers_) {
    worker->SetScript([](ScriptedCall*) {
      return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "the queue is full");
    });
  }
  const Transcript got = Run(Request("hello", 5));
  EXPECT_EQ(got.status.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(got.status), "QUEUE_FULL");
  EXPECT_EQ(Pushback(got), -1);
  EXPECT_EQ(Attempts(), 1U);
}

TEST_F(StatusTest, WorkersReasonAndDelayGoOn) {
  StartWith(1);
  workers_[0]->SetScript([](ScriptedCall*) {
    absl::Status status = absl::ResourceExhaustedError("waited too long");
    SetErrorInfo(&status, reason::kQueueTimeout);
    SetRetryInfo(&status, std::chrono::seconds(2));
    return ToGrpcStatus(status);
  });
  const Transcript got = Run(Request("hello", 5));
  EXPECT_EQ(ErrorReason(got.status), "QUEUE_TIMEOUT");
  EXPECT_EQ(Pushback(got), 2000);
}

TEST_F(StatusTest, ConcurrencyLimitRefusesBeforeAnyWork) {
  GatewayOptions options;
  options.limits.max_concurrency = 1;
  StartWith(1, options);
  workers_[0]->SetScript([](ScriptedCall* call) {
    call->Admit();
    EXPECT_TRUE(call->WaitForCancel());
    return grpc::Status::OK;
  });
  grpc::ClientContext context;
  auto reader = stub_->GenerateStream(&context, Request("hello", 5));
  pb::GenerateStreamResponse response;
  ASSERT_TRUE(reader->Read(&response));
  const Transcript got = Run(Request("hello", 5));
  EXPECT_EQ(got.status.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(got.status), "OVERLOADED");
  EXPECT_EQ(Pushback(got), -1);
  EXPECT_EQ(Attempts(), 1U);
  context.TryCancel();
  while (reader->Read(&response)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

// Each way to fail before the first token: the other group takes the request.
TEST_F(StatusTest, LostBeforeTheFirstTokenIsRetriedOnAnotherGroup) {
  StartWith(2);
  for (const bool after_admitted : {false, true}) {
    for (const auto code :
         {grpc::StatusCode::UNAVAILABLE, grpc::StatusCode::INTERNAL, grpc::StatusCode::CANCELLED}) {
      const size_t before = Attempts();
      // Whichever is picked first fails; the other one is good.
      std::atomic<int> calls{0};
      for (auto& worker : workers_) {
        worker->SetScript([&, after_admitted, code](ScriptedCall* call) {
          if (calls.fetch_add(1) > 0) return SpeakLetters()(call);
          if (after_admitted) call->Admit();
          return grpc::Status(code, "gone");
        });
      }
      const Transcript got = Run(Request("hello", 10));
      EXPECT_TRUE(got.status.ok()) << got.status;
      EXPECT_EQ(got.text.at(0), LettersOf(7, 10));
      EXPECT_EQ(Attempts() - before, 2U);
    }
  }
  EXPECT_EQ(workers_[0]->requests()[0].seed(), workers_[1]->requests()[0].seed());
}

TEST_F(StatusTest, RetriesOnlyOnce) {
  StartWith(3);
  for (auto& worker : workers_) {
    worker->SetScript(
        [](ScriptedCall*) { return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone"); });
  }
  const Transcript got = Run(Request("hello", 10));
  EXPECT_EQ(got.status.code(), StatusCode::kUnavailable);
  EXPECT_EQ(ErrorReason(got.status), "NO_WORKER");
  EXPECT_GE(Pushback(got), 500);
  EXPECT_LE(Pushback(got), 2000);
  EXPECT_EQ(*RetryDelay(got.status) / std::chrono::milliseconds(1), Pushback(got));
  EXPECT_EQ(Attempts(), 2U);
}

TEST_F(StatusTest, LostAfterTheFirstTokenIsNeverRetried) {
  StartWith(2);
  for (auto& worker : workers_) {
    worker->SetScript([](ScriptedCall* call) {
      call->Admit();
      call->SayLetters(0, 5);
      return grpc::Status(grpc::StatusCode::UNAVAILABLE, "gone");
    });
  }
  const Transcript got = Run(Request("hello", 10));
  EXPECT_EQ(got.status.code(), StatusCode::kUnavailable);
  EXPECT_EQ(ErrorReason(got.status), "WORKER_LOST");
  EXPECT_EQ(got.text.at(0), LettersOf(7, 5));  // what came is right
  EXPECT_TRUE(got.finished.empty());
  EXPECT_EQ(got.trailers.at("x-tokens-sent"), "5");
  EXPECT_TRUE(got.trailers.contains("x-cause"));
  EXPECT_FALSE(got.trailers.contains("grpc-retry-pushback-ms"));
  EXPECT_EQ(Attempts(), 1U);
}

TEST_F(StatusTest, KilledGroupFailsItsStreamsAndOnlyThose) {
  StartWith(2);
  std::atomic<bool> killed{false};
  for (auto& worker : workers_) {
    worker->SetScript([&killed](ScriptedCall* call) {
      call->Admit();
      call->SayLetters(0, 3);
      if (!call->WaitFor(killed)) return grpc::Status::OK;
      if (call->SayLetters(3, call->request.max_tokens())) call->Finish(wire::FINISH_REASON_LENGTH);
      return grpc::Status::OK;
    });
  }
  std::atomic<int> speaking{0};
  std::vector<Transcript> transcripts(8);
  std::vector<std::thread> clients;
  clients.reserve(transcripts.size());
  for (auto& transcript : transcripts) {
    clients.emplace_back(
        [&] { transcript = Run(Request("hello", 60), std::chrono::seconds(20), &speaking); });
  }
  // Before their first token they would be sent again elsewhere.
  EXPECT_TRUE(WaitUntil([&] { return speaking == 8; }));
  workers_[0]->Stop();
  killed = true;
  for (std::thread& client : clients) client.join();
  int lost = 0;
  for (const Transcript& got : transcripts) {
    if (got.trailers.at("x-group") == "g1") {
      EXPECT_TRUE(got.status.ok()) << got.status;
      EXPECT_EQ(got.text.at(0), LettersOf(7, 60));
      continue;
    }
    ++lost;
    EXPECT_EQ(got.status.code(), StatusCode::kUnavailable) << got.status;
    EXPECT_TRUE(LettersOf(7, 60).starts_with(got.text.at(0)));
    EXPECT_EQ(got.trailers.at("x-tokens-sent"), std::to_string(got.text.at(0).size()));
  }
  EXPECT_GT(lost, 0);
  EXPECT_EQ(static_cast<size_t>(lost), workers_[0]->requests().size());
  EXPECT_TRUE(WaitUntil([&] { return ReadyGroups() == 1; }));
}

TEST_F(StatusTest, EngineFaultIsFixedTextWithACause) {
  StartWith(1);
  workers_[0]->SetScript([](ScriptedCall* call) {
    call->Admit();
    call->SayLetters(0, 2);
    return grpc::Status(grpc::StatusCode::INTERNAL, "logits are not finite at /secret/path");
  });
  const Transcript got = Run(Request("hello", 10));
  EXPECT_EQ(got.status.code(), StatusCode::kInternal);
  EXPECT_EQ(ErrorReason(got.status), "ENGINE_FAULT");
  EXPECT_THAT(std::string(got.status.message()), Not(HasSubstr("secret")));
  EXPECT_EQ(ErrorInfoMetadata(got.status)[0].second, got.trailers.at("x-cause"));
}

TEST_F(StatusTest, EndWithoutAnEndIsALostGroup) {
  StartWith(1);
  workers_[0]->SetScript([](ScriptedCall* call) {
    call->Admit();
    call->SayLetters(0, 2);
    return grpc::Status::OK;
  });
  EXPECT_EQ(ErrorReason(Run(Request("hello", 10)).status), "WORKER_LOST");
}

TEST_F(StatusTest, NoGroupReadyIsUnavailableAtOnce) {
  GatewayOptions options;
  options.groups = {"unix:/nonexistent/socket"};
  StartGateway(options);
  const auto begin = std::chrono::steady_clock::now();
  const Transcript got = Run(Request("hello", 10));
  EXPECT_EQ(got.status.code(), StatusCode::kUnavailable);
  EXPECT_EQ(ErrorReason(got.status), "NO_WORKER");
  EXPECT_GE(Pushback(got), 500);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
}

TEST_F(StatusTest, GroupThatIsNotReadyTakesNothing) {
  StartWith(1);
  wire::Load load;
  load.set_ready(false);
  workers_[0]->SetLoad(load);
  ASSERT_TRUE(WaitUntil([&] { return ReadyGroups() == 0; }));
  EXPECT_EQ(ErrorReason(Run(Request("hello", 10)).status), "NO_WORKER");
  load.set_ready(true);
  workers_[0]->SetLoad(load);
  ASSERT_TRUE(WaitUntil([&] { return ReadyGroups() == 1; }));
  EXPECT_TRUE(Run(Request("hello", 10)).status.ok());
}

TEST_F(StatusTest, GroupComesBackAfterItWasLost) {
  StartWith(1);
  const std::string address = workers_[0]->address();
  workers_[0]->Stop();
  ASSERT_TRUE(WaitUntil([&] { return ReadyGroups() == 0; }));
  EXPECT_EQ(Run(Request("hello", 10)).status.code(), StatusCode::kUnavailable);
  workers_[0]->Start(address);
  ASSERT_TRUE(WaitUntil([&] { return ReadyGroups() == 1; }));
  EXPECT_TRUE(Run(Request("hello", 10)).status.ok());
}

TEST_F(StatusTest, GroupWithOtherFilesIsRefused) {
  workers_.push_back(std::make_unique<ScriptedWorker>());
  workers_.push_back(std::make_unique<ScriptedWorker>());
  workers_[1]->info.set_tokenizer_hash("another");
  GatewayOptions options;
  for (auto& worker : workers_) {
    worker->Start();
    options.groups.push_back(worker->address());
  }
  StartGateway(options);
  ASSERT_TRUE(WaitUntil([&] { return ReadyGroups() == 1; }));
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(Run(Request("hello", 3)).status.ok());
  EXPECT_TRUE(workers_[0]->requests().empty() || workers_[1]->requests().empty());
  EXPECT_EQ(ReadyGroups(), 1U);
}

TEST_F(StatusTest, DeadlineIsForwardedWithAMarginAndEndsInTime) {
  StartWith(1);
  workers_[0]->SetScript([](ScriptedCall* call) {
    call->Admit();
    call->SayLetters(0, 3);
    EXPECT_TRUE(call->WaitForCancel());
    return grpc::Status::OK;
  });
  const auto begin = std::chrono::steady_clock::now();
  const Transcript got = Run(Request("hello", 10), std::chrono::milliseconds(900));
  const auto took = std::chrono::steady_clock::now() - begin;
  EXPECT_EQ(got.status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_GE(took, std::chrono::milliseconds(880));
  EXPECT_LT(took, std::chrono::milliseconds(4000));
  ASSERT_EQ(workers_[0]->time_left().size(), 1U);
  EXPECT_LE(workers_[0]->time_left()[0], std::chrono::milliseconds(891));
  EXPECT_TRUE(WaitUntil([&] { return workers_[0]->active() == 0; }));
}

// gRPC sends 1501 ms as 1510: the client leaves before the gateway sees the time pass.
TEST_F(StatusTest, ClientThatLeavesAtItsDeadlineIsCountedSo) {
  GatewayOptions options;
  options.limits.deadline_margin = Duration::zero();  // or the worker's deadline came first
  StartWith(1, options);
  workers_[0]->SetScript([](ScriptedCall* call) {
    call->Admit();
    EXPECT_TRUE(call->WaitForCancel());
    return grpc::Status::OK;
  });
  const Transcript got = Run(Request("hello", 10), std::chrono::milliseconds(1501));
  EXPECT_EQ(got.status.code(), StatusCode::kDeadlineExceeded);
  ExpectIdle();
  EXPECT_EQ(server_->core().metrics.stream_cancelled[1]->Value(), 1);
  EXPECT_EQ(server_->core().metrics.stream_cancelled[0]->Value(), 0);
}

TEST_F(StatusTest, DeadlineThatIsNearlyOverNeverReachesAWorker) {
  StartWith(1);
  const Transcript got = Run(Request("hello", 10), std::chrono::milliseconds(8));
  EXPECT_EQ(got.status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(Attempts(), 0U);
}

TEST_F(StatusTest, WithoutADeadlineNoneIsSent) {
  StartWith(1);
  grpc::ClientContext context;
  auto reader = stub_->GenerateStream(&context, Request("hello", 5));
  pb::GenerateStreamResponse response;
  while (reader->Read(&response)) {
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_GT(workers_[0]->time_left()[0], std::chrono::hours(1));
}

TEST_F(StatusTest, CancelReachesTheWorker) {
  StartWith(1);
  workers_[0]->SetScript([](ScriptedCall* call) {
    call->Admit();
    call->SayLetters(0, 2);
    EXPECT_TRUE(call->WaitForCancel());
    return grpc::Status::OK;
  });
  {
    pb::GenerateStreamRequest request = Request("hello", 10);
    request.mutable_request()->mutable_sampling()->set_n(2);
    grpc::ClientContext context;
    auto reader = stub_->GenerateStream(&context, request);
    pb::GenerateStreamResponse response;
    ASSERT_TRUE(reader->Read(&response));
    EXPECT_TRUE(WaitUntil([&] { return workers_[0]->active() == 2; }));
    context.TryCancel();
    while (reader->Read(&response)) {
    }
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  EXPECT_TRUE(WaitUntil([&] { return workers_[0]->cancelled() == 2; }));
  ExpectIdle();
  EXPECT_EQ(server_->core().metrics.stream_cancelled[0]->Value(), 1);
}

TEST_F(StatusTest, ClientThatVanishesCancelsToo) {
  StartWith(1);
  workers_[0]->SetScript([](ScriptedCall* call) {
    call->Admit();
    EXPECT_TRUE(call->WaitForCancel());
    return grpc::Status::OK;
  });
  grpc::ClientContext context;
  pb::GenerateResponse response;
  std::thread client([&] {
    EXPECT_FALSE(stub_->Generate(&context, Request("hello", 10).request(), &response).ok());
  });
  EXPECT_TRUE(WaitUntil([&] { return workers_[0]->active() == 1; }));
  context.TryCancel();
  client.join();
  EXPECT_TRUE(WaitUntil([&] { return workers_[0]->cancelled() == 1; }));
}

TEST_F(StatusTest, SeveralModelsMustBeNamed) {
  workers_.push_back(std::make_unique<ScriptedWorker>());
  workers_.push_back(std::make_unique<ScriptedWorker>());
  workers_[1]->info.set_model("n");
  GatewayOptions options;
  for (auto& worker : workers_) {
    worker->Start();
    options.groups.push_back(worker->address());
  }
  StartGateway(options);
  ASSERT_TRUE(WaitUntil([&] { return ReadyGroups() == 2; }));
  EXPECT_THAT(BadFields(Run(Request("hello", 3)).status), ElementsAre("request.model"));
  pb::GenerateStreamRequest request = Request("hello", 3);
  request.mutable_request()->set_model("n");
  EXPECT_EQ(Run(request).trailers.at("x-group"), "g1");
}

TEST_F(StatusTest, ModelWithoutTemplateCannotChat) {
  GatewayOptions options;
  options.tokenizer_factory =
      [](const text::TokenizerFiles&) -> absl::StatusOr<std::shared_ptr<const text::Tokenizer>> {
    return std::make_shared<ByteTokenizer>(/*chat=*/false);
  };
  StartWith(1, options);
  pb::ChatRequest request;
  request.add_messages()->set_role("user");
  pb::ChatResponse response;
  grpc::ClientContext context;
  const absl::Status status = FromGrpcStatus(stub_->Chat(&context, request, &response));
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(ErrorReason(status), "CAPABILITY");
}

TEST_F(StatusTest, TemplatesRefusalNamesTheField) {
  StartWith(1);
  pb::ChatRequest request;
  request.add_messages()->set_role("user");
  request.mutable_messages(0)->set_content("refuse");
  pb::ChatResponse response;
  grpc::ClientContext context;
  const absl::Status status = FromGrpcStatus(stub_->Chat(&context, request, &response));
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(BadFields(status), ElementsAre("messages"));
}

TEST_F(StatusTest, AnswerTooLargeForOneMessageIsRefused) {
  GatewayOptions options;
  options.limits.send_message_bytes = 4096;
  StartWith(1, options);
  pb::GenerateRequest request = Request("hello", 500).request();
  request.mutable_output()->set_logprobs(20);
  pb::GenerateResponse response;
  const Transcript got = RunUnary(request, &response);
  EXPECT_EQ(got.status.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(ErrorReason(got.status), "RESPONSE_TOO_LARGE");
  EXPECT_TRUE(WaitUntil([&] { return workers_[0]->active() == 0; }));
}

}  // namespace
}  // namespace nibble::gateway
