#include "services/gateway/unary_call.h"

#include <algorithm>
#include <utility>

#include "services/gateway/event_queue.h"
#include "services/gateway/message_codec.h"
#include "services/gateway/status_contract.h"

namespace nibble::gateway {

namespace pb = inference::v1;

void UnaryCall::Start(const grpc::ByteBuffer& bytes) {
  const absl::Status status = Enter();
  if (!status.ok()) return Reply(status);
  Run(bytes);
}

void UnaryCall::Reply(const absl::StatusOr<std::unique_ptr<google::protobuf::Message>>& response) {
  if (response.ok()) *response_ = SerializeMessage(**response);
  Finish(Close(response.status()));
}

void UnaryCall::ReplyFromPool(size_t bytes, Work work) {
  const bool queued = core().pool.Submit(bytes, [this, work = std::move(work)] {
    Reply(DeadlinePassed() ? DeadlineError() : work());
  });
  if (!queued) {
    Reply(OverloadedError("texts to tokenize", static_cast<int64_t>(core().limits.tokenize_queue)));
  }
}

void UnaryCall::OnDone() {
  Leave();
  delete this;
}

UnaryGeneration::UnaryGeneration(Core* core, Rpc rpc, grpc::CallbackServerContext* context,
                                 grpc::ByteBuffer* response)
    : CallBase(core, rpc, context),
      response_(response),
      generation_(std::make_shared<Generation>(GenerationOptions{.core = core,
                                                                 .sink = this,
                                                                 .rpc = rpc,
                                                                 .streaming = false,
                                                                 .arrived = arrived(),
                                                                 .deadline = deadline()})) {}

void UnaryGeneration::Start(const grpc::ByteBuffer& bytes) {
  absl::Status status = Enter();
  if (status.ok()) {
    auto input = Parse(bytes);
    if (input.ok()) return generation_->Begin(*std::move(input), caller());
    status = input.status();
  }
  generation_->Refuse(status);
}

void UnaryGeneration::OnStarted(const std::string& request_id, pb::Started started) {
  collected_.request_id = request_id;
  collected_.model = started.model();
  collected_.seed = started.seed();
  collected_.max_tokens = started.max_tokens();
  for (uint32_t i = 0; i < started.sampling().n(); ++i) collected_.choices.Add()->set_index(i);
}

absl::Status UnaryGeneration::OnDelta(pb::Delta delta) {
  bytes_ += EventQueue::BytesOf(delta);
  const auto limit = static_cast<size_t>(core().limits.send_message_bytes);
  if (bytes_ > limit) return ResponseTooLargeError(core().limits.send_message_bytes);
  pb::Choice* choice = collected_.choices.Mutable(static_cast<int>(delta.index()));
  choice->mutable_text()->append(delta.text());
  choice->mutable_token_ids()->MergeFrom(delta.token_ids());
  for (pb::TokenLogprobs& logprobs : *delta.mutable_logprobs()) {
    *choice->add_logprobs() = std::move(logprobs);
  }
  return absl::OkStatus();
}

void UnaryGeneration::OnFinished(pb::Finished finished) {
  pb::Choice* choice = collected_.choices.Mutable(static_cast<int>(finished.index()));
  choice->set_reason(finished.reason());
  if (finished.matched_case() == pb::Finished::kStopTokenId) {
    choice->set_stop_token_id(finished.stop_token_id());
  } else if (finished.matched_case() == pb::Finished::kStopString) {
    choice->set_stop_string(finished.stop_string());
  }
  pb::Usage& usage = collected_.usage;
  usage.set_prompt_tokens(usage.prompt_tokens() + finished.usage().prompt_tokens());
  usage.set_completion_tokens(usage.completion_tokens() + finished.usage().completion_tokens());
  usage.set_cached_prompt_tokens(usage.cached_prompt_tokens() +
                                 finished.usage().cached_prompt_tokens());
  if (finished.index() == 0) collected_.timings = finished.timings();
}

void UnaryGeneration::OnEnd(GenerationEnd end) {
  if (end.status.ok()) {
    *response_ = Encode(std::move(collected_));
  } else {
    end.tokens_delivered = 0;  // the client has seen nothing of the answer
  }
  Finish(Close(end));
}

void UnaryGeneration::OnCancel() {
  const bool late = LeftAtDeadline();
  generation_->Stop(late ? DeadlineError() : CancelledError(),
                    late ? CancelledBy::kDeadline : CancelledBy::kClient, /*flush=*/false);
}

void UnaryGeneration::Cut(const absl::Status& status) {
  generation_->Stop(status, CancelledBy::kServer, /*flush=*/false);
}

void UnaryGeneration::OnDone() {
  Leave();
  delete this;
}

}  // namespace nibble::gateway
