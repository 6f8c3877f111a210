// A gateway in this process with scripted worker groups behind it, over real gRPC.
#pragma once

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/grpc_status.h"
#include "nibble/inference/v1/inference.grpc.pb.h"
#include "services/gateway/server.h"
#include "tests/integration/gateway/scripted_worker.h"
#include "tests/unit/services/gateway/byte_tokenizer.h"

namespace nibble::gateway {

namespace pb = inference::v1;

// Bounded wait on what another thread or process does.
inline bool WaitUntil(const std::function<bool()>& condition,
                      std::chrono::milliseconds limit = std::chrono::seconds(10)) {
  const auto until = std::chrono::steady_clock::now() + limit;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

// What one streaming call brought.
struct Transcript {
  absl::Status status;
  std::map<std::string, std::string> trailers;
  std::optional<pb::Started> started;
  std::map<uint32_t, std::string> text;  // by choice
  std::map<uint32_t, std::vector<uint32_t>> ids;
  std::map<uint32_t, pb::Finished> finished;
  int messages = 0;
  uint32_t tokens = 0;  // by the deltas' own count
  std::vector<std::string> problems;
};

class GatewayFixture : public ::testing::Test {
 protected:
  // Runs `count` workers and a gateway before them; ready when this returns.
  void StartWith(size_t count, GatewayOptions options = {}) {
    for (size_t i = 0; i < count; ++i) {
      workers_.push_back(std::make_unique<ScriptedWorker>());
      workers_.back()->Start();
      options.groups.push_back(workers_.back()->address());
    }
    StartGateway(std::move(options));
    ASSERT_TRUE(WaitUntil([&] { return ReadyGroups() == count; }));
  }

  void StartGateway(GatewayOptions options) {
    options.listen = "127.0.0.1:0";
    if (options.tick == GatewayOptions().tick) options.tick = std::chrono::milliseconds(10);
    if (!options.tokenizer_factory) {
      options.tokenizer_factory = [](const text::TokenizerFiles&)
          -> absl::StatusOr<std::shared_ptr<const text::Tokenizer>> {
        return std::make_shared<ByteTokenizer>();
      };
    }
    auto server = GatewayServer::Start(std::move(options));
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ = NewChannel();
    stub_ = pb::InferenceService::NewStub(channel_);
    model_stub_ = pb::ModelService::NewStub(channel_);
  }

  std::shared_ptr<grpc::Channel> NewChannel(
      grpc::ChannelArguments arguments = {},
      const std::shared_ptr<grpc::ChannelCredentials>& credentials =
          grpc::InsecureChannelCredentials()) const {
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    arguments.SetMaxReceiveMessageSize(-1);
    arguments.SetMaxSendMessageSize(-1);
    return grpc::CreateCustomChannel(server_->address(), credentials, arguments);
  }

  size_t ReadyGroups() const {
    size_t ready = 0;
    for (const GroupSnapshot& group : server_->core().router.Snapshot()) ready += group.ready;
    return ready;
  }

  // Everything that a call may hold has been given back.
  void ExpectIdle() {
    Core& core = server_->core();
    EXPECT_TRUE(WaitUntil([&] {
      if (core.calls.size() != 0 || core.upstreams.count() != 0) return false;
      if (core.pool.depth() != 0 || core.retry_budget.taken() != 0) return false;
      for (const GroupSnapshot& group : core.router.Snapshot()) {
        if (group.in_flight != 0) return false;
      }
      return core.metrics.stream_buffered_bytes->Value() == 0;
    })) << "calls "
        << core.calls.size() << " upstreams " << core.upstreams.count();
  }

  static pb::GenerateStreamRequest Request(const std::string& text, uint32_t max_tokens,
                                           uint64_t seed = 7) {
    pb::GenerateStreamRequest request;
    request.mutable_request()->set_text(text);
    request.mutable_request()->mutable_stopping()->set_max_tokens(max_tokens);
    request.mutable_request()->mutable_sampling()->set_seed(seed);
    return request;
  }

  static void Take(const pb::GenerateStreamResponse& response, Transcript* transcript) {
    ++transcript->messages;
    if (!transcript->finished.empty() && response.has_started()) {
      transcript->problems.push_back("started after a finish");
    }
    if (response.has_started()) {
      if (transcript->messages != 1) transcript->problems.push_back("started is not first");
      transcript->started = response.started();
    } else if (response.has_delta()) {
      const pb::Delta& delta = response.delta();
      if (transcript->finished.contains(delta.index())) {
        transcript->problems.push_back("delta after its choice's finish");
      }
      transcript->text[delta.index()] += delta.text();
      auto& ids = transcript->ids[delta.index()];
      ids.insert(ids.end(), delta.token_ids().begin(), delta.token_ids().end());
      if (delta.index() == 0) transcript->tokens = delta.completion_tokens();
    } else {
      if (transcript->finished.contains(response.finished().index())) {
        transcript->problems.push_back("a choice finished twice");
      }
      transcript->finished[response.finished().index()] = response.finished();
    }
  }

  static void TakeEnd(const grpc::Status& status, const grpc::ClientContext& context,
                      Transcript* transcript) {
    transcript->status = FromGrpcStatus(status);
    for (const auto& [key, value] : context.GetServerTrailingMetadata()) {
      transcript->trailers.emplace(std::string(key.data(), key.size()),
                                   std::string(value.data(), value.size()));
    }
  }

  // Where `delta_seen` is given, it counts this call with its first delta.
  Transcript Run(const pb::GenerateStreamRequest& request,
                 std::chrono::milliseconds deadline = std::chrono::seconds(20),
                 std::atomic<int>* delta_seen = nullptr) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + deadline);
    auto reader = stub_->GenerateStream(&context, request);
    Transcript transcript;
    pb::GenerateStreamResponse response;
    while (reader->Read(&response)) {
      Take(response, &transcript);
      if (response.has_delta() && delta_seen != nullptr) {
        ++*delta_seen;
        delta_seen = nullptr;
      }
    }
    TakeEnd(reader->Finish(), context, &transcript);
    EXPECT_TRUE(transcript.problems.empty()) << transcript.problems.front();
    return transcript;
  }

  // The unary RPC; the response goes to *response.
  Transcript RunUnary(const pb::GenerateRequest& request, pb::GenerateResponse* response) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    Transcript transcript;
    TakeEnd(stub_->Generate(&context, request, response), context, &transcript);
    return transcript;
  }

  // Any bytes to any method.
  Transcript RunBytes(const std::string& method, const std::string& bytes,
                      std::string* reply = nullptr,
                      grpc_compression_algorithm compression = GRPC_COMPRESS_NONE) {
    grpc::GenericStub generic(channel_);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    context.set_compression_algorithm(compression);
    grpc::CompletionQueue queue;
    const grpc::Slice slice(bytes);
    grpc::ByteBuffer request(&slice, 1);
    auto call = generic.PrepareUnaryCall(&context, method, request, &queue);
    call->StartCall();
    grpc::ByteBuffer response;
    grpc::Status status;
    call->Finish(&response, &status, this);
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    Transcript transcript;
    TakeEnd(status, context, &transcript);
    if (reply != nullptr) {
      grpc::Slice flat;
      if (response.TrySingleSlice(&flat).ok()) {
        reply->assign(reinterpret_cast<const char*>(flat.begin()), flat.size());
      }
    }
    return transcript;
  }

  void TearDown() override {
    if (server_ != nullptr && !skip_idle_check_) ExpectIdle();
    for (auto& worker : workers_) worker->Stop();
    server_.reset();
  }

  std::vector<std::unique_ptr<ScriptedWorker>> workers_;
  std::unique_ptr<GatewayServer> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<pb::InferenceService::Stub> stub_;
  std::unique_ptr<pb::ModelService::Stub> model_stub_;
  bool skip_idle_check_ = false;
};

}  // namespace nibble::gateway
