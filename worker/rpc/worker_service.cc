#include "worker/rpc/worker_service.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/grpc_deadline.h"
#include "base/grpc_status.h"

namespace nibble::rpc {
namespace {

using worker::v1::GenerateResponse;
using worker::v1::GetTokenizerResponse;

constexpr size_t kChunkBytes = 256 * 1024;
constexpr int kAbortIdsMax = 1024;

// A stream that ends with its status before anything was sent.
class RefusedGenerate final : public grpc::ServerWriteReactor<GenerateResponse> {
 public:
  explicit RefusedGenerate(const absl::Status& status) { Finish(ToGrpcStatus(status)); }
  void OnDone() override { delete this; }
};

// Sends the files chunk by chunk, the next one when the last is written. Owns itself.
class TokenizerStream final : public grpc::ServerWriteReactor<GetTokenizerResponse> {
 public:
  explicit TokenizerStream(const TokenizerFiles& files) : files_(files.files()) { SendNext(); }

  void OnWriteDone(bool ok) override {
    if (!ok) return Finish(grpc::Status::CANCELLED);
    SendNext();
  }
  void OnDone() override { delete this; }

 private:
  void SendNext() {
    if (file_ == files_.size()) return Finish(grpc::Status::OK);
    const auto& [name, contents] = files_[file_];
    const size_t bytes = std::min(kChunkBytes, contents.size() - offset_);
    message_.set_file(name);
    message_.set_chunk(contents.data() + offset_, bytes);
    offset_ += bytes;
    if (offset_ == contents.size()) {
      ++file_;
      offset_ = 0;
    }
    StartWrite(&message_);
  }

  const TokenizerFiles::Files& files_;
  GetTokenizerResponse message_;
  size_t file_ = 0;
  size_t offset_ = 0;
};

grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* rpc, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = rpc->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

}  // namespace

WorkerService::WorkerService(WorkerServiceOptions options) : options_(std::move(options)) {
  options_.model_info.set_tokenizer_hash(options_.tokenizer_files->hash());
}

grpc::ServerWriteReactor<GenerateResponse>* WorkerService::Generate(
    grpc::CallbackServerContext* rpc, const worker::v1::GenerateRequest* request) {
  const Deadline deadline = FromGrpcDeadline(rpc->raw_deadline(), *options_.clock);
  absl::StatusOr<engine::Request> converted =
      ToEngineRequest(*request, options_.limits, deadline, *options_.clock);
  if (!converted.ok()) {
    const bool too_long = ErrorReason(converted.status()) == reason::kContextLengthExceeded;
    options_.stats->rejected[too_long ? step::kTooLong : step::kInvalid].Add();
    return new RefusedGenerate(converted.status());
  }
  const GenerateCallContext context{.engine = options_.engine,
                                    .clock = options_.clock,
                                    .outbox = &outbox_,
                                    .open_calls = &open_calls_};
  return GenerateCall::Open(context, rpc, request->request_id(), *std::move(converted));
}

grpc::ServerUnaryReactor* WorkerService::Abort(grpc::CallbackServerContext* rpc,
                                               const worker::v1::AbortRequest* request,
                                               worker::v1::AbortResponse* /*response*/) {
  if (request->request_ids_size() > kAbortIdsMax) {
    const FieldViolation violation{
        .field = "request_ids",
        .description =
            absl::StrCat("has ", request->request_ids_size(), " entries; limit is ", kAbortIdsMax)};
    return Answer(rpc, InvalidFieldsError({&violation, 1}));
  }
  for (const std::string& id : request->request_ids()) {
    // An empty id is no name: it would end every stream that has none.
    if (!id.empty()) open_calls_.Abort(id);
  }
  return Answer(rpc, absl::OkStatus());
}

grpc::ServerUnaryReactor* WorkerService::GetModelInfo(
    grpc::CallbackServerContext* rpc, const worker::v1::GetModelInfoRequest* /*request*/,
    worker::v1::GetModelInfoResponse* response) {
  *response = options_.model_info;
  return Answer(rpc, absl::OkStatus());
}

grpc::ServerWriteReactor<GetTokenizerResponse>* WorkerService::GetTokenizer(
    grpc::CallbackServerContext* /*rpc*/, const worker::v1::GetTokenizerRequest* /*request*/) {
  return new TokenizerStream(*options_.tokenizer_files);
}

grpc::ServerUnaryReactor* WorkerService::GetLoad(grpc::CallbackServerContext* rpc,
                                                 const worker::v1::GetLoadRequest* /*request*/,
                                                 worker::v1::GetLoadResponse* response) {
  *response->mutable_load() = CurrentLoad();
  return Answer(rpc, absl::OkStatus());
}

grpc::ServerWriteReactor<worker::v1::WatchLoadResponse>* WorkerService::WatchLoad(
    grpc::CallbackServerContext* /*rpc*/, const worker::v1::WatchLoadRequest* /*request*/) {
  return watchers_.Open(CurrentLoad());
}

grpc::ServerUnaryReactor* WorkerService::Drain(grpc::CallbackServerContext* rpc,
                                               const worker::v1::DrainRequest* /*request*/,
                                               worker::v1::DrainResponse* response) {
  options_.engine->Drain();
  options_.on_drain();
  const engine::Load load = options_.engine->GetLoad();
  response->set_remaining(static_cast<uint32_t>(load.running + load.waiting));
  return Answer(rpc, absl::OkStatus());
}

worker::v1::Load WorkerService::CurrentLoad() const {
  const engine::Load load = options_.engine->GetLoad();
  worker::v1::Load message;
  message.set_running(static_cast<uint32_t>(load.running));
  message.set_waiting(static_cast<uint32_t>(load.waiting));
  message.set_waiting_prompt_tokens(static_cast<uint64_t>(load.waiting_prompt_tokens));
  message.set_kv_blocks_used(static_cast<uint32_t>(load.kv_blocks_used));
  message.set_kv_blocks_total(static_cast<uint32_t>(load.kv_blocks_total));
  message.set_steps(load.steps);
  message.set_draining(load.draining);
  message.set_ready(load.ready && !load.draining && options_.group_ready());
  return message;
}

void WorkerService::Tick() {
  watchers_.Push(CurrentLoad());
  open_calls_.Sweep(options_.clock->Now(), options_.stall_limit);
}

}  // namespace nibble::rpc
