// A worker group without an engine: says what a test tells it to say, and remembers what it was
// asked. Listens on a unix socket or a free port of the loopback.
#pragma once

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "nibble/worker/v1/worker.grpc.pb.h"

namespace nibble::gateway {

// Letter i of the answer with this seed; as a token id it is its own byte.
[[nodiscard]] char LetterOf(uint64_t seed, uint32_t index);
// The first `count` letters.
[[nodiscard]] std::string LettersOf(uint64_t seed, uint32_t count);

// One Generate as a script sees it.
class ScriptedCall {
 public:
  using Writer = grpc::ServerWriter<worker::v1::GenerateResponse>;
  ScriptedCall(const worker::v1::GenerateRequest& asked, grpc::ServerContext* context,
               Writer* writer, const std::atomic<bool>* stopping)
      : request(asked), context_(context), writer_(writer), stopping_(stopping) {}

  // False where the gateway has gone.
  bool Admit();
  bool Say(const std::string& text);  // one message, a token per byte
  bool SayIds(const std::vector<uint32_t>& ids);
  bool SayLetters(uint32_t begin, uint32_t end);  // a message each
  bool Finish(worker::v1::FinishReason reason);
  // Waits for the gateway to cancel; false when it has not after ten seconds.
  bool WaitForCancel();
  // Waits until `flag` is set; false when the gateway goes, or ten seconds pass, before it is.
  bool WaitFor(const std::atomic<bool>& flag);
  // The gateway has gone. A write may fail a moment before gRPC calls the stream cancelled.
  [[nodiscard]] bool cancelled() const { return write_failed_ || context_->IsCancelled(); }

  const worker::v1::GenerateRequest& request;

 private:
  bool Write(const worker::v1::GenerateResponse& response);

  grpc::ServerContext* context_;
  Writer* writer_;
  const std::atomic<bool>* stopping_;
  bool write_failed_ = false;
};

using Script = std::function<grpc::Status(ScriptedCall*)>;

// Admits, sends the seed's letters up to max_tokens, ends by length.
[[nodiscard]] Script SpeakLetters();

class ScriptedWorker final : public worker::v1::WorkerService::Service {
 public:
  // What it is; changed before Start only.
  worker::v1::GetModelInfoResponse info;
  std::vector<std::pair<std::string, std::string>> tokenizer_files;

  ScriptedWorker();
  ~ScriptedWorker() override { Stop(); }

  void Start(const std::string& address = "127.0.0.1:0",
             const std::shared_ptr<grpc::ServerCredentials>& credentials =
                 grpc::InsecureServerCredentials());
  // As a killed process would: every stream breaks.
  void Stop();
  void SetScript(Script script);
  void SetLoad(const worker::v1::Load& load);

  [[nodiscard]] const std::string& address() const { return address_; }
  [[nodiscard]] std::vector<worker::v1::GenerateRequest> requests() const;
  [[nodiscard]] std::vector<std::chrono::milliseconds> time_left() const;
  [[nodiscard]] int active() const { return active_.load(); }
  [[nodiscard]] int cancelled() const { return cancelled_.load(); }

 private:
  using Context = grpc::ServerContext;
  grpc::Status Generate(Context* context, const worker::v1::GenerateRequest* request,
                        grpc::ServerWriter<worker::v1::GenerateResponse>* writer) override;
  grpc::Status GetModelInfo(Context* context, const worker::v1::GetModelInfoRequest* request,
                            worker::v1::GetModelInfoResponse* response) override;
  grpc::Status GetTokenizer(Context* context, const worker::v1::GetTokenizerRequest* request,
                            grpc::ServerWriter<worker::v1::GetTokenizerResponse>* writer) override;
  grpc::Status WatchLoad(Context* context, const worker::v1::WatchLoadRequest* request,
                         grpc::ServerWriter<worker::v1::WatchLoadResponse>* writer) override;

  std::string address_;
  std::unique_ptr<grpc::Server> server_;
  std::atomic<bool> stopping_{false};
  std::atomic<int> active_{0};
  std::atomic<int> cancelled_{0};
  mutable absl::Mutex mutex_;
  Script script_ ABSL_GUARDED_BY(mutex_) = SpeakLetters();
  worker::v1::Load load_ ABSL_GUARDED_BY(mutex_);
  std::vector<worker::v1::GenerateRequest> requests_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::chrono::milliseconds> time_left_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace nibble::gateway
