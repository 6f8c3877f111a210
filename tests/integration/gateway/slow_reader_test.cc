// A reader that is slow or stalls costs bounded memory, and only its own stream.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <string>

#include "tests/integration/gateway/gateway_fixture.h"

namespace nibble::gateway {
namespace {

namespace wire = worker::v1;

// Sends `total` bytes of text as fast as the gateway takes them, counting.
Script Flood(size_t total, std::atomic<size_t>* sent) {
  return [total, sent](ScriptedCall* call) {
    call->Admit();
    const std::string piece(64, 'x');
    for (size_t done = 0; done < total; done += piece.size()) {
      if (!call->Say(piece)) return grpc::Status::OK;
      sent->fetch_add(piece.size());
    }
    call->Finish(wire::FINISH_REASON_LENGTH);
    return grpc::Status::OK;
  };
}

class SlowReaderTest : public GatewayFixture {
 protected:
  static constexpr size_t kTotal = 2 << 20;

  void Start(std::chrono::milliseconds stall) {
    GatewayOptions options;
    options.limits.stall_timeout = stall;
    workers_.push_back(std::make_unique<ScriptedWorker>());
    workers_[0]->info.set_context_length(1 << 30);
    workers_[0]->Start();
    options.groups = {workers_[0]->address()};
    StartGateway(options);
    ASSERT_TRUE(WaitUntil([&] { return ReadyGroups() == 1; }));
    workers_[0]->SetScript(Flood(kTotal, &sent_));
    // A small window, so that what the client does not read stays at the gateway.
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 64 << 10);
    arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    slow_stub_ = pb::InferenceService::NewStub(NewChannel(arguments));
  }
  // Until the gateway's own buffer for the stream is full and nothing moves any more.
  void WaitForStandstill() {
    size_t last = 0;
    auto since = std::chrono::steady_clock::now();
    EXPECT_TRUE(WaitUntil([&] {
      if (sent_ != last) {
        last = sent_;
        since = std::chrono::steady_clock::now();
      }
      return server_->core().metrics.stream_buffered_bytes->Value() > 32 << 10 &&
             std::chrono::steady_clock::now() - since > std::chrono::milliseconds(300);
    }));
  }

  std::atomic<size_t> sent_{0};
  std::unique_ptr<pb::InferenceService::Stub> slow_stub_;
};

TEST_F(SlowReaderTest, BacklogIsBoundedAndEverythingArrivesInTheEnd) {
  Start(std::chrono::seconds(30));
  grpc::ClientContext context;
  auto reader = slow_stub_->GenerateStream(&context, Request("hello", kTotal));
  WaitForStandstill();
  EXPECT_LT(sent_, size_t{1} << 20);  // tokens of one byte text each, held all along the way
  EXPECT_LE(server_->core().metrics.stream_buffered_bytes->Value(), (64 << 10) + 4096);
  EXPECT_GT(server_->core().metrics.stream_buffered_bytes->Value(), 32 << 10);
  Transcript got;
  pb::GenerateStreamResponse response;
  while (reader->Read(&response)) Take(response, &got);
  TakeEnd(reader->Finish(), context, &got);
  EXPECT_TRUE(got.status.ok()) << got.status;
  EXPECT_EQ(got.text.at(0), std::string(kTotal, 'x'));
  EXPECT_EQ(got.finished.at(0).usage().completion_tokens(), kTotal);
  EXPECT_LT(got.messages, static_cast<int>(kTotal / 64));  // merged while they waited
}

TEST_F(SlowReaderTest, OthersAreNotHeldUp) {
  Start(std::chrono::seconds(30));
  grpc::ClientContext context;
  auto reader = slow_stub_->GenerateStream(&context, Request("hello", kTotal));
  WaitForStandstill();
  workers_[0]->SetScript(SpeakLetters());
  for (int i = 0; i < 20; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_TRUE(Run(Request("hello", 50)).status.ok());
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
  }
  context.TryCancel();
  pb::GenerateStreamResponse response;
  while (reader->Read(&response)) {
  }
  (void)reader->Finish();
}

TEST_F(SlowReaderTest, CancelWhileStalledGivesEverythingBack) {
  Start(std::chrono::seconds(30));
  grpc::ClientContext context;
  auto reader = slow_stub_->GenerateStream(&context, Request("hello", kTotal));
  WaitForStandstill();
  context.TryCancel();
  EXPECT_TRUE(WaitUntil([&] { return workers_[0]->cancelled() == 1; }));
  ExpectIdle();
  pb::GenerateStreamResponse response;
  while (reader->Read(&response)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(SlowReaderTest, StallEndsResourceExhaustedAndCancelsTheWorker) {
  Start(std::chrono::milliseconds(400));
  grpc::ClientContext context;
  auto reader = slow_stub_->GenerateStream(&context, Request("hello", kTotal));
  EXPECT_TRUE(WaitUntil([&] { return workers_[0]->cancelled() == 1; }));
  Transcript got;
  pb::GenerateStreamResponse response;
  while (reader->Read(&response)) Take(response, &got);
  TakeEnd(reader->Finish(), context, &got);
  EXPECT_EQ(got.status.code(), absl::StatusCode::kResourceExhausted) << got.status;
  EXPECT_TRUE(std::string(kTotal, 'x').starts_with(got.text[0]));
  EXPECT_EQ(server_->core().metrics.stream_cancelled[2]->Value(), 1);
}

}  // namespace
}  // namespace nibble::gateway
