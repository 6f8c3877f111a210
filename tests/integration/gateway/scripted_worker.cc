#include "tests/integration/gateway/scripted_worker.h"

#include <thread>
#include <utility>

#include "base/check.h"

namespace nibble::gateway {
namespace {

namespace wire = worker::v1;
constexpr auto kBeat = std::chrono::milliseconds(20);

}  // namespace

char LetterOf(uint64_t seed, uint32_t index) {
  // splitmix64
  uint64_t x = seed + 0x9E3779B97F4A7C15ULL * (index + 1);
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  return static_cast<char>('a' + (x ^ (x >> 31)) % 26);
}

std::string LettersOf(uint64_t seed, uint32_t count) {
  std::string letters;
  for (uint32_t i = 0; i < count; ++i) letters += LetterOf(seed, i);
  return letters;
}

bool ScriptedCall::Write(const wire::GenerateResponse& response) {
  write_failed_ = write_failed_ || !writer_->Write(response);
  return !write_failed_;
}

bool ScriptedCall::Admit() {
  wire::GenerateResponse response;
  response.mutable_admitted()->set_cached_prompt_tokens(1);
  return Write(response);
}

bool ScriptedCall::SayIds(const std::vector<uint32_t>& ids) {
  wire::GenerateResponse response;
  for (const uint32_t id : ids) {
    response.mutable_tokens()->add_ids(id);
    if (request.has_logprobs()) {
      auto* logprobs = response.mutable_tokens()->add_logprobs();
      logprobs->set_sampled(-1);
      for (uint32_t k = 0; k < request.logprobs(); ++k) logprobs->add_top()->set_token_id(id);
    }
  }
  return Write(response);
}

bool ScriptedCall::Say(const std::string& text) {
  std::vector<uint32_t> ids;
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
  return SayIds(ids);
}

bool ScriptedCall::SayLetters(uint32_t begin, uint32_t end) {
  for (uint32_t i = begin; i < end; ++i) {
    if (!Say(std::string(1, LetterOf(request.seed(), i)))) return false;
  }
  return true;
}

bool ScriptedCall::Finish(wire::FinishReason reason) {
  wire::GenerateResponse response;
  response.mutable_finished()->set_reason(reason);
  response.mutable_finished()->mutable_queue()->set_nanos(1000);
  return Write(response);
}

bool ScriptedCall::WaitForCancel() {
  for (int i = 0; i < 2000; ++i) {
    if (context_->IsCancelled() || stopping_->load()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return false;
}

bool ScriptedCall::WaitFor(const std::atomic<bool>& flag) {
  for (int i = 0; i < 2000 && !flag.load(); ++i) {
    if (cancelled() || stopping_->load()) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return flag.load();
}

Script SpeakLetters() {
  return [](ScriptedCall* call) {
    call->Admit();
    if (call->SayLetters(0, call->request.max_tokens())) call->Finish(wire::FINISH_REASON_LENGTH);
    return grpc::Status::OK;
  };
}

ScriptedWorker::ScriptedWorker() {
  info.set_model("m");
  info.set_model_hash("model-hash");
  info.add_memory()->set_weights_bytes(1234);
  info.set_tokenizer_hash("tokenizer-hash");
  info.set_vocab_size(258);
  info.set_context_length(512);
  info.set_max_sequences(16);
  info.set_architecture("Test");
  info.set_quantization("awq gemm g64");
  info.set_tensor_parallel(2);
  tokenizer_files = {{"tokenizer.json", "{}"},
                     {"config.json", R"({"eos_token_id": 257})"},
                     {"generation_config.json", R"({"temperature": 0.5})"}};
  absl::MutexLock lock(&mutex_);
  load_.set_ready(true);
}

void ScriptedWorker::Start(const std::string& address,
                           const std::shared_ptr<grpc::ServerCredentials>& credentials) {
  stopping_.store(false);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(address, credentials, &port);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  CHECK_MSG(server_ != nullptr && port != 0, address);
  address_ = address.starts_with("unix:") ? address : "127.0.0.1:" + std::to_string(port);
}

void ScriptedWorker::Stop() {
  if (server_ == nullptr) return;
  stopping_.store(true);
  server_->Shutdown(std::chrono::system_clock::now());
  server_.reset();
}

void ScriptedWorker::SetScript(Script script) {
  absl::MutexLock lock(&mutex_);
  script_ = std::move(script);
}

void ScriptedWorker::SetLoad(const wire::Load& load) {
  absl::MutexLock lock(&mutex_);
  load_ = load;
}

std::vector<wire::GenerateRequest> ScriptedWorker::requests() const {
  absl::MutexLock lock(&mutex_);
  return requests_;
}

std::vector<std::chrono::milliseconds> ScriptedWorker::time_left() const {
  absl::MutexLock lock(&mutex_);
  return time_left_;
}

grpc::Status ScriptedWorker::Generate(Context* context, const wire::GenerateRequest* request,
                                      grpc::ServerWriter<wire::GenerateResponse>* writer) {
  Script script;
  {
    absl::MutexLock lock(&mutex_);
    script = script_;
    requests_.push_back(*request);
    time_left_.push_back(std::chrono::duration_cast<std::chrono::milliseconds>(
        context->deadline() - std::chrono::system_clock::now()));
  }
  ++active_;
  ScriptedCall call(*request, context, writer, &stopping_);
  grpc::Status status = script(&call);
  if (call.cancelled()) ++cancelled_;
  --active_;
  return status;
}

grpc::Status ScriptedWorker::GetModelInfo(Context* /*context*/,
                                          const wire::GetModelInfoRequest* /*request*/,
                                          wire::GetModelInfoResponse* response) {
  *response = info;
  return grpc::Status::OK;
}

grpc::Status ScriptedWorker::GetTokenizer(Context* /*context*/,
                                          const wire::GetTokenizerRequest* /*request*/,
                                          grpc::ServerWriter<wire::GetTokenizerResponse>* writer) {
  for (const auto& [name, contents] : tokenizer_files) {
    for (size_t begin = 0; begin < contents.size(); begin += 1 << 20) {
      wire::GetTokenizerResponse response;
      response.set_file(name);
      response.set_chunk(contents.substr(begin, 1 << 20));
      writer->Write(response);
    }
  }
  return grpc::Status::OK;
}

grpc::Status ScriptedWorker::WatchLoad(Context* context, const wire::WatchLoadRequest* /*request*/,
                                       grpc::ServerWriter<wire::WatchLoadResponse>* writer) {
  while (!context->IsCancelled() && !stopping_.load()) {
    wire::WatchLoadResponse response;
    {
      absl::MutexLock lock(&mutex_);
      *response.mutable_load() = load_;
    }
    if (!writer->Write(response)) break;
    std::this_thread::sleep_for(kBeat);
  }
  return grpc::Status::OK;
}

}  // namespace nibble::gateway
