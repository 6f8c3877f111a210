#include "worker/rpc/worker_service.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "base/grpc_status.h"
#include "tests/unit/worker/rpc/fake_engine.h"

namespace nibble::rpc {
namespace {

using worker::v1::GenerateResponse;

// The service in this process, a channel to it, and an engine that the test plays.
class WorkerServiceTest : public testing::Test {
 protected:
  WorkerServiceTest()
      : files_({{"tokenizer.json", std::string(600'000, 'a') + "z"}, {"config.json", "{}"}}) {
    WorkerServiceOptions options;
    options.engine = &engine_;
    options.clock = &clock_;
    options.stats = &stats_;
    options.tokenizer_files = &files_;
    options.model_info.set_model("tiny");
    options.limits.vocab_size = 1000;
    options.limits.max_context = 100'000;
    options.on_drain = [this] { ++drains_; };
    service_ = std::make_unique<WorkerService>(std::move(options));
    grpc::ServerBuilder builder;
    builder.RegisterService(service_.get());
    server_ = builder.BuildAndStart();
    stub_ = worker::v1::WorkerService::NewStub(server_->InProcessChannel({}));
  }

  ~WorkerServiceTest() override {
    service_->CloseWatchers();
    server_->Shutdown();
    EXPECT_EQ(service_->open_streams(), 0u);
  }

  static worker::v1::GenerateRequest Request(const std::string& id = "r-1") {
    worker::v1::GenerateRequest request;
    request.set_request_id(id);
    request.add_prompt_token_ids(1);
    request.set_max_tokens(99'000);
    worker::v1::SamplingParams* sampling = request.mutable_sampling();
    sampling->set_temperature(1);
    sampling->set_top_p(1);
    sampling->set_typical_p(1);
    sampling->set_repetition_penalty(1);
    return request;
  }

  // One client's stream.
  struct Client {
    explicit Client(worker::v1::WorkerService::Stub* stub,
                    const worker::v1::GenerateRequest& request)
        : stream(stub->Generate(&context, request)) {}
    GenerateResponse Read() {
      GenerateResponse response;
      EXPECT_TRUE(stream->Read(&response));
      return response;
    }
    // Reads to the end: every token id, and the status.
    grpc::Status ReadAll() {
      GenerateResponse response;
      while (stream->Read(&response)) {
        ++messages;
        ids.insert(ids.end(), response.tokens().ids().begin(), response.tokens().ids().end());
        if (response.has_finished()) finished = response.finished();
      }
      return stream->Finish();
    }
    std::string Trailer(const std::string& key) const {
      const auto& trailers = context.GetServerTrailingMetadata();
      const auto found = trailers.find(key);
      return found == trailers.end() ? "" : std::string(found->second.data(), found->second.size());
    }

    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<GenerateResponse>> stream;
    int messages = 0;
    std::vector<uint32_t> ids;
    worker::v1::Finished finished;
  };

  std::unique_ptr<Client> Open(const worker::v1::GenerateRequest& request = Request()) {
    return std::make_unique<Client>(stub_.get(), request);
  }

  static void Give(engine::Sink* sink, int32_t first, int32_t count) {
    std::vector<engine::OutputToken> tokens;
    for (int32_t i = 0; i < count; ++i) tokens.push_back({.token_id = first + i});
    sink->OnTokens(tokens);
  }

  FakeEngine engine_;
  ManualClock clock_;
  step::EngineStats stats_;
  TokenizerFiles files_;
  std::atomic<int> drains_{0};
  std::unique_ptr<WorkerService> service_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<worker::v1::WorkerService::Stub> stub_;
};

TEST_F(WorkerServiceTest, StreamsAdmissionTokensAndFinish) {
  auto client = Open();
  auto sink = engine_.AwaitSink(1);
  sink->OnAdmitted(7);
  EXPECT_EQ(client->Read().admitted().cached_prompt_tokens(), 7u);
  Give(sink.get(), 10, 1);
  EXPECT_THAT(client->Read().tokens().ids(), testing::ElementsAre(10));
  Give(sink.get(), 11, 2);
  sink->OnFinished({.status = absl::OkStatus(),
                    .reason = engine::FinishReason::kLength,
                    .completion_tokens = 3,
                    .cached_prompt_tokens = 7,
                    .preemptions = 2,
                    .queue = std::chrono::milliseconds(1500),
                    .prefill = std::chrono::nanoseconds(5),
                    .decode = std::chrono::seconds(2)});
  EXPECT_TRUE(client->ReadAll().ok());
  EXPECT_THAT(client->ids, testing::ElementsAre(11, 12));
  EXPECT_EQ(client->finished.reason(), worker::v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(client->finished.completion_tokens(), 3u);
  EXPECT_EQ(client->finished.cached_prompt_tokens(), 7u);
  EXPECT_EQ(client->finished.preemptions(), 2u);
  EXPECT_EQ(client->finished.queue().seconds(), 1);
  EXPECT_EQ(client->finished.queue().nanos(), 500'000'000);
  EXPECT_EQ(client->finished.prefill().nanos(), 5);
  EXPECT_EQ(client->finished.decode().seconds(), 2);
  EXPECT_EQ(client->Trailer("x-tokens-sent"), "3");
}

TEST_F(WorkerServiceTest, CarriesLogprobsBesideTheirTokens) {
  auto request = Request();
  request.set_logprobs(2);
  auto client = Open(request);
  auto sink = engine_.AwaitSink(1);
  EXPECT_EQ(engine_.request(1).logprobs, 2);
  const std::array<step::TokenLogprob, 2> top = {
      {{.token_id = 5, .logprob = -0.5f}, {.token_id = 6, .logprob = -1.5f}}};
  const std::array<engine::OutputToken, 2> tokens = {
      {{.token_id = 5, .logprob = -0.5f, .top = top}, {.token_id = 9, .logprob = -7}}};
  sink->OnAdmitted(0);
  sink->OnTokens(tokens);
  client->Read();
  const GenerateResponse response = client->Read();
  ASSERT_EQ(response.tokens().logprobs_size(), 2);
  EXPECT_FLOAT_EQ(response.tokens().logprobs(0).sampled(), -0.5f);
  ASSERT_EQ(response.tokens().logprobs(0).top_size(), 2);
  EXPECT_EQ(response.tokens().logprobs(0).top(1).token_id(), 6u);
  EXPECT_FLOAT_EQ(response.tokens().logprobs(0).top(1).logprob(), -1.5f);
  EXPECT_FLOAT_EQ(response.tokens().logprobs(1).sampled(), -7);
  EXPECT_EQ(response.tokens().logprobs(1).top_size(), 0);
  sink->OnFinished({.status = absl::OkStatus()});
  EXPECT_TRUE(client->ReadAll().ok());
}

TEST_F(WorkerServiceTest, CoalescesTokensBehindAnUnreadMessage) {
  auto client = Open();
  auto sink = engine_.AwaitSink(1);
  sink->OnAdmitted(0);
  for (int32_t i = 0; i < 500; ++i) Give(sink.get(), i, 1);
  sink->OnFinished({.status = absl::OkStatus(), .completion_tokens = 500});
  EXPECT_TRUE(client->ReadAll().ok());
  ASSERT_EQ(client->ids.size(), 500u);
  for (uint32_t i = 0; i < 500; ++i) ASSERT_EQ(client->ids[i], i);
  // Admitted, tokens, finished, and a message or two that gRPC took before anybody read.
  EXPECT_LE(client->messages, 6);
}

TEST_F(WorkerServiceTest, CutsOffAReaderThatFallsTooFarBehind) {
  constexpr int32_t kFits = GenerateCall::kUnsentBytesMax / sizeof(uint32_t);
  auto within = Open(Request("within"));
  auto within_sink = engine_.AwaitSink(1);
  auto client = Open();
  auto sink = engine_.AwaitSink(2);
  within_sink->OnAdmitted(0);
  Give(within_sink.get(), 0, kFits);
  sink->OnAdmitted(0);
  // In one call: gRPC may take a message or two before anybody reads.
  Give(sink.get(), 0, kFits + 1);
  Give(sink.get(), kFits + 1, 1000);  // no longer kept
  service_->Tick();
  engine_.AwaitCancelled(2);
  const grpc::Status status = client->ReadAll();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(ErrorReason(FromGrpcStatus(status)), reason::kSlowReader);
  ASSERT_EQ(client->ids.size(), size_t{kFits} + 1);
  for (uint32_t i = 0; i < client->ids.size(); ++i) ASSERT_EQ(client->ids[i], i);
  EXPECT_EQ(client->Trailer("x-tokens-sent"), std::to_string(kFits + 1));

  within_sink->OnFinished({.status = absl::OkStatus()});
  EXPECT_TRUE(within->ReadAll().ok());
  EXPECT_EQ(within->ids.size(), size_t{kFits});
  EXPECT_EQ(engine_.cancel_count(), 1u);
}

TEST_F(WorkerServiceTest, EndsAStreamWhoseReaderStalls) {
  auto stalled = Open(Request("stalled"));
  auto sink = engine_.AwaitSink(1);
  auto idle = Open(Request("idle"));  // nothing is outstanding on this one
  auto idle_sink = engine_.AwaitSink(2);
  auto other = Open(Request("other"));
  auto other_sink = engine_.AwaitSink(3);
  sink->OnAdmitted(0);
  // The outbox works in order: when this one is through, the write on the first has begun.
  other_sink->OnFinished({.status = absl::OkStatus()});
  EXPECT_TRUE(other->ReadAll().ok());
  clock_.Advance(std::chrono::seconds(40));
  service_->Tick();
  EXPECT_EQ(engine_.cancel_count(), 0u);
  clock_.Advance(std::chrono::seconds(1));
  service_->Tick();
  EXPECT_EQ(stalled->ReadAll().error_code(), grpc::StatusCode::CANCELLED);
  engine_.AwaitCancelled(1);
  Give(idle_sink.get(), 1, 1);
  idle_sink->OnFinished({.status = absl::OkStatus()});
  EXPECT_TRUE(idle->ReadAll().ok());
  EXPECT_THAT(idle->ids, testing::ElementsAre(1));
}

TEST_F(WorkerServiceTest, CancelsTheSequenceOfAClientThatLeaves) {
  auto client = Open();
  auto sink = engine_.AwaitSink(1);
  sink->OnAdmitted(0);
  client->Read();
  client->context.TryCancel();
  engine_.AwaitCancelled(1);
  EXPECT_EQ(client->ReadAll().error_code(), grpc::StatusCode::CANCELLED);
  Give(sink.get(), 1, 5);  // what the engine still had in flight goes nowhere
}

TEST_F(WorkerServiceTest, CancelsTheSequenceAtTheCallsDeadline) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(200));
  auto stream = stub_->Generate(&context, Request());
  auto sink = engine_.AwaitSink(1);
  EXPECT_GT(engine_.request(1).deadline, clock_.Now() - std::chrono::seconds(1));
  // The wire rounds timeouts up.
  EXPECT_LE(engine_.request(1).deadline, clock_.Now() + std::chrono::milliseconds(300));
  engine_.AwaitCancelled(1);
  GenerateResponse response;
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
}

TEST_F(WorkerServiceTest, RefusesABadRequestBeforeTheEngineSeesIt) {
  auto request = Request();
  request.mutable_sampling()->set_top_p(0);
  const grpc::Status status = Open(request)->ReadAll();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  const auto violations = FieldViolations(FromGrpcStatus(status));
  ASSERT_EQ(violations.size(), 1u);
  EXPECT_EQ(violations[0].field, "sampling.top_p");
  EXPECT_EQ(stats_.rejected[step::kInvalid].Get(), 1u);
  auto too_long = Request();
  too_long.set_max_tokens(100'000);
  EXPECT_EQ(ErrorReason(FromGrpcStatus(Open(too_long)->ReadAll())), reason::kContextLengthExceeded);
  EXPECT_EQ(stats_.rejected[step::kTooLong].Get(), 1u);
}

struct StatusCase {
  absl::Status engine;
  grpc::StatusCode code;
  std::string_view reason;
};

TEST_F(WorkerServiceTest, PassesOnWhyTheEngineRefuses) {
  const std::vector<StatusCase> cases = {
      {absl::ResourceExhaustedError("full"), grpc::StatusCode::RESOURCE_EXHAUSTED,
       reason::kQueueFull},
      {absl::UnavailableError("draining"), grpc::StatusCode::UNAVAILABLE, reason::kDraining},
      {absl::InvalidArgumentError("too long"), grpc::StatusCode::INVALID_ARGUMENT,
       reason::kContextLengthExceeded},
      {absl::DeadlineExceededError("late"), grpc::StatusCode::DEADLINE_EXCEEDED,
       reason::kDeadline}};
  for (const StatusCase& one : cases) {
    engine_.RefuseWith(one.engine);
    const grpc::Status status = Open()->ReadAll();
    EXPECT_EQ(status.error_code(), one.code);
    EXPECT_EQ(ErrorReason(FromGrpcStatus(status)), one.reason);
  }
}

TEST_F(WorkerServiceTest, EndsStreamsWithTheContractsStatus) {
  const std::vector<StatusCase> cases = {
      {absl::CancelledError("x"), grpc::StatusCode::CANCELLED, ""},
      {absl::DeadlineExceededError("x"), grpc::StatusCode::DEADLINE_EXCEEDED, reason::kDeadline},
      {absl::ResourceExhaustedError("x"), grpc::StatusCode::RESOURCE_EXHAUSTED,
       reason::kQueueTimeout},
      {absl::InternalError("x"), grpc::StatusCode::INTERNAL, reason::kEngineFault},
      {absl::UnavailableError("x"), grpc::StatusCode::UNAVAILABLE, reason::kWorkerLost}};
  engine::RequestId id = 0;
  for (const StatusCase& one : cases) {
    auto client = Open();
    auto sink = engine_.AwaitSink(++id);
    sink->OnAdmitted(0);
    Give(sink.get(), 1, 2);
    sink->OnFinished({.status = one.engine});
    const grpc::Status status = client->ReadAll();
    EXPECT_EQ(status.error_code(), one.code);
    EXPECT_EQ(ErrorReason(FromGrpcStatus(status)), one.reason);
    EXPECT_THAT(client->ids, testing::ElementsAre(1, 2));  // before the status, all of it
    EXPECT_EQ(client->Trailer("x-tokens-sent"), "2");
    EXPECT_EQ(RetryDelay(FromGrpcStatus(status)).has_value(),
              one.code == grpc::StatusCode::UNAVAILABLE);
  }
}

TEST_F(WorkerServiceTest, AbortEndsTheNamedStreamsAndNoOthers) {
  auto first = Open(Request("a"));
  engine_.AwaitSink(1);
  auto second = Open(Request("b"));
  engine_.AwaitSink(2);
  auto nameless = Open(Request(""));
  engine_.AwaitSink(3);

  grpc::ClientContext context;
  worker::v1::AbortRequest request;
  request.add_request_ids("b");
  request.add_request_ids("nobody");
  request.add_request_ids("");
  worker::v1::AbortResponse response;
  EXPECT_TRUE(stub_->Abort(&context, request, &response).ok());
  EXPECT_EQ(second->ReadAll().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_EQ(engine_.cancel_count(), 1u);
  engine_.Cancel(1);
  engine_.Cancel(3);
  first->ReadAll();
  nameless->ReadAll();
}

TEST_F(WorkerServiceTest, AbortRefusesAnEndlessList) {
  grpc::ClientContext context;
  worker::v1::AbortRequest request;
  const std::string id = "x";
  for (int i = 0; i < 1025; ++i) request.add_request_ids(id);
  worker::v1::AbortResponse response;
  EXPECT_EQ(stub_->Abort(&context, request, &response).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(WorkerServiceTest, SendsTheTokenizerInChunksWithItsHash) {
  grpc::ClientContext context;
  auto stream = stub_->GetTokenizer(&context, {});
  worker::v1::GetTokenizerResponse response;
  std::vector<std::pair<std::string, std::string>> files;
  int messages = 0;
  while (stream->Read(&response)) {
    ++messages;
    if (files.empty() || files.back().first != response.file()) {
      files.emplace_back(response.file(), "");
    }
    files.back().second += response.chunk();
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(files, files_.files());
  EXPECT_EQ(messages, 4);  // 600 001 bytes make three

  grpc::ClientContext info_context;
  worker::v1::GetModelInfoResponse info;
  EXPECT_TRUE(stub_->GetModelInfo(&info_context, {}, &info).ok());
  EXPECT_EQ(info.model(), "tiny");
  EXPECT_EQ(info.tokenizer_hash(), files_.hash());
}

TEST(TokenizerFiles, HashIsSha256OverNamesSizesAndContents) {
  // printf 'a.txt\0\3\0\0\0\0\0\0\0abcb\0\0\0\0\0\0\0\0\0' | sha256sum
  EXPECT_EQ(TokenizerFiles({{"a.txt", "abc"}, {"b", ""}}).hash(),
            "f4fcc7474955eed0bac37daf36e285b46ecfa75208de72f1ced124e3b85d4fff");
}

TEST_F(WorkerServiceTest, ReportsAndPushesTheLoad) {
  engine_.set_load({.running = 3,
                    .waiting = 4,
                    .waiting_prompt_tokens = 500,
                    .kv_blocks_used = 6,
                    .kv_blocks_total = 70,
                    .steps = 8,
                    .draining = false,
                    .ready = true});
  grpc::ClientContext context;
  worker::v1::GetLoadResponse now;
  ASSERT_TRUE(stub_->GetLoad(&context, {}, &now).ok());
  EXPECT_EQ(now.load().running(), 3u);
  EXPECT_EQ(now.load().waiting(), 4u);
  EXPECT_EQ(now.load().waiting_prompt_tokens(), 500u);
  EXPECT_EQ(now.load().kv_blocks_used(), 6u);
  EXPECT_EQ(now.load().kv_blocks_total(), 70u);
  EXPECT_EQ(now.load().steps(), 8u);
  EXPECT_TRUE(now.load().ready());

  grpc::ClientContext watch_context;
  auto watch = stub_->WatchLoad(&watch_context, {});
  worker::v1::WatchLoadResponse pushed;
  ASSERT_TRUE(watch->Read(&pushed));  // at once
  EXPECT_EQ(pushed.load().steps(), 8u);
  engine_.set_load({.steps = 9, .draining = true, .ready = true});
  service_->Tick();
  ASSERT_TRUE(watch->Read(&pushed));
  EXPECT_EQ(pushed.load().steps(), 9u);
  EXPECT_TRUE(pushed.load().draining());
  EXPECT_FALSE(pushed.load().ready());
  service_->CloseWatchers();
  EXPECT_FALSE(watch->Read(&pushed));
  EXPECT_EQ(watch->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(WorkerServiceTest, AWatcherThatIsBehindGetsTheNewestLoad) {
  grpc::ClientContext context;
  auto watch = stub_->WatchLoad(&context, {});
  worker::v1::WatchLoadResponse pushed;
  ASSERT_TRUE(watch->Read(&pushed));
  for (uint64_t steps = 1; steps <= 100; ++steps) {
    engine_.set_load({.steps = steps, .ready = true});
    service_->Tick();
  }
  int messages = 0;
  while (pushed.load().steps() != 100) {
    ASSERT_TRUE(watch->Read(&pushed));
    ++messages;
  }
  EXPECT_LE(messages, 3);
  context.TryCancel();
  EXPECT_EQ(watch->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(WorkerServiceTest, DrainStopsTheEngineAndSaysWhatIsLeft) {
  engine_.set_load({.running = 2, .waiting = 3, .ready = true});
  grpc::ClientContext context;
  worker::v1::DrainResponse response;
  ASSERT_TRUE(stub_->Drain(&context, {}, &response).ok());
  EXPECT_EQ(response.remaining(), 5u);
  EXPECT_TRUE(engine_.GetLoad().draining);
  EXPECT_EQ(drains_, 1);
}

}  // namespace
}  // namespace nibble::rpc
