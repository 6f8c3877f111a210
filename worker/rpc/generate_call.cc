#include "worker/rpc/generate_call.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/grpc_status.h"
#include "worker/rpc/engine_status.h"
#include "worker/rpc/proto_duration.h"

namespace nibble::rpc {
namespace {

constexpr size_t kTokensReserved = 32;

}  // namespace

// ---- The list of open calls ----

void OpenCalls::Add(GenerateCall* call) {
  const absl::MutexLock lock(&mutex_);
  calls_.push_back(call);
}

void OpenCalls::Remove(GenerateCall* call) {
  const absl::MutexLock lock(&mutex_);
  const auto found = std::find(calls_.begin(), calls_.end(), call);
  if (found == calls_.end()) return;
  *found = calls_.back();
  calls_.pop_back();
}

void OpenCalls::Abort(const std::string& request_id) {
  std::vector<std::shared_ptr<GenerateCall>> matching;
  {
    const absl::MutexLock lock(&mutex_);
    for (GenerateCall* call : calls_) {
      if (call->request_id() == request_id) matching.push_back(call->shared_from_this());
    }
  }
  for (const auto& call : matching) call->CancelSequence();
}

void OpenCalls::Sweep(Deadline now, Duration stall_limit) {
  std::vector<std::shared_ptr<GenerateCall>> all;
  {
    const absl::MutexLock lock(&mutex_);
    all.reserve(calls_.size());
    for (GenerateCall* call : calls_) all.push_back(call->shared_from_this());
  }
  for (const auto& call : all) call->CheckReader(now, stall_limit);
}

size_t OpenCalls::count() const {
  const absl::MutexLock lock(&mutex_);
  return calls_.size();
}

// ---- Tokens on their way ----

void GenerateCall::Unsent::Clear() {
  ids.clear();
  logprobs.clear();
  top_counts.clear();
  top.clear();
}

size_t GenerateCall::Unsent::bytes() const {
  return ids.size() * sizeof(uint32_t) + logprobs.size() * (sizeof(float) + sizeof(int32_t)) +
         top.size() * sizeof(step::TokenLogprob);
}

void GenerateCall::Unsent::MoveTo(worker::v1::Tokens* message) {
  message->Clear();
  message->mutable_ids()->Add(ids.begin(), ids.end());
  size_t next_top = 0;
  for (size_t i = 0; i < logprobs.size(); ++i) {
    worker::v1::TokenLogprobs* of_token = message->add_logprobs();
    of_token->set_sampled(logprobs[i]);
    for (int32_t j = 0; j < top_counts[i]; ++j, ++next_top) {
      worker::v1::TokenLogprob* alternative = of_token->add_top();
      alternative->set_token_id(static_cast<uint32_t>(top[next_top].token_id));
      alternative->set_logprob(top[next_top].logprob);
    }
  }
  Clear();
}

// ---- The call ----

GenerateCall* GenerateCall::Open(const GenerateCallContext& context,
                                 grpc::CallbackServerContext* rpc, std::string request_id,
                                 engine::Request request) {
  const std::shared_ptr<GenerateCall> call(
      new GenerateCall(context, rpc, std::move(request_id), request.logprobs >= 0));
  {
    const absl::MutexLock lock(&call->mutex_);
    call->self_ = call;
  }
  context.open_calls->Add(call.get());
  absl::StatusOr<engine::RequestId> sequence = context.engine->Submit(std::move(request), call);
  if (sequence.ok()) {
    bool cancel = false;
    {
      const absl::MutexLock lock(&call->mutex_);
      call->sequence_ = *sequence;
      cancel = call->cancel_wanted_;  // an abort that came before the id was known
    }
    if (cancel) context.engine->Cancel(*sequence);
  } else {
    {
      const absl::MutexLock lock(&call->mutex_);
      call->closed_ = true;
    }
    call->FinishWith(WithSubmitReason(std::move(sequence).status()), 0);
  }
  return call.get();  // lives until OnDone, which gRPC calls after this has returned
}

GenerateCall::GenerateCall(const GenerateCallContext& context, grpc::CallbackServerContext* rpc,
                           std::string request_id, bool logprobs)
    : context_(context), rpc_(rpc), request_id_(std::move(request_id)), logprobs_(logprobs) {
  unsent_.ids.reserve(kTokensReserved);
  sending_.ids.reserve(kTokensReserved);
}

void GenerateCall::Wake() {
  if (queued_ || writing_ || closed_) return;  // whoever is at it will look again
  queued_ = true;
  context_.outbox->Add(shared_from_this());
}

void GenerateCall::OnAdmitted(int32_t cached_prompt_tokens) {
  const absl::MutexLock lock(&mutex_);
  admitted_ = cached_prompt_tokens;
  Wake();
}

void GenerateCall::OnTokens(std::span<const engine::OutputToken> tokens) {
  const absl::MutexLock lock(&mutex_);
  if (closed_ || broken_ || too_slow_) return;
  for (const engine::OutputToken& token : tokens) {
    unsent_.ids.push_back(static_cast<uint32_t>(token.token_id));
    if (!logprobs_) continue;
    unsent_.logprobs.push_back(token.logprob);
    unsent_.top_counts.push_back(static_cast<int32_t>(token.top.size()));
    unsent_.top.insert(unsent_.top.end(), token.top.begin(), token.top.end());
  }
  // The sweep cancels it; until then nothing more is kept.
  if (unsent_.bytes() > kUnsentBytesMax) too_slow_ = true;
  Wake();
}

void GenerateCall::OnFinished(const engine::Finish& finish) {
  const absl::MutexLock lock(&mutex_);
  finish_ = finish;
  Wake();
}

void GenerateCall::OnWriteDone(bool ok) {
  {
    const absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (!ok) broken_ = true;
  }
  if (!ok) CancelSequence();
  SendPending();
}

void GenerateCall::OnCancel() {
  {
    const absl::MutexLock lock(&mutex_);
    broken_ = true;
  }
  CancelSequence();
  SendPending();
}

void GenerateCall::OnDone() {
  context_.open_calls->Remove(this);
  std::shared_ptr<GenerateCall> self;
  const absl::MutexLock lock(&mutex_);
  // Released after the lock, which it holds: `self` is declared before.
  std::swap(self, self_);
}

void GenerateCall::CancelSequence() {
  std::optional<engine::RequestId> sequence;
  {
    const absl::MutexLock lock(&mutex_);
    cancel_wanted_ = true;
    sequence = sequence_;
  }
  if (sequence.has_value()) context_.engine->Cancel(*sequence);
}

void GenerateCall::CheckReader(Deadline now, Duration stall_limit) {
  bool cancel = false;
  {
    const absl::MutexLock lock(&mutex_);
    if (closed_) return;
    const bool stalled = writing_ && now - write_began_ > stall_limit;
    if (stalled) {
      too_slow_ = true;
      // The status would queue behind what the reader does not take. The call is not done while
      // this lock is held and closed_ is false, so the context is still there.
      rpc_->TryCancel();
    }
    cancel = too_slow_;
  }
  if (cancel) CancelSequence();
}

GenerateCall::Send GenerateCall::NextSend() {
  if (writing_ || closed_) return Send::kNothing;
  if (broken_) {
    closed_ = true;
    return Send::kStatus;
  }
  if (admitted_.has_value() || !unsent_.ids.empty()) {
    writing_ = true;
    write_began_ = context_.clock->Now();
    if (admitted_.has_value()) return Send::kAdmitted;
    tokens_sent_ += unsent_.ids.size();
    std::swap(unsent_, sending_);
    return Send::kTokens;
  }
  if (!finish_.has_value()) return Send::kNothing;
  closed_ = true;
  return finish_->status.ok() && !too_slow_ ? Send::kFinished : Send::kStatus;
}

void GenerateCall::SendPending() {
  Send send;
  int32_t cached_prompt_tokens = 0;
  uint64_t tokens_sent = 0;
  engine::Finish finish;
  absl::Status status;
  {
    const absl::MutexLock lock(&mutex_);
    queued_ = false;
    send = NextSend();
    tokens_sent = tokens_sent_;
    if (send == Send::kAdmitted) cached_prompt_tokens = *std::exchange(admitted_, std::nullopt);
    if (send == Send::kFinished) finish = *finish_;
    if (send == Send::kStatus) status = FinalStatus();
  }
  switch (send) {
    case Send::kNothing:
      return;
    case Send::kAdmitted:
      response_.mutable_admitted()->set_cached_prompt_tokens(
          static_cast<uint32_t>(cached_prompt_tokens));
      StartWrite(&response_);
      return;
    case Send::kTokens:
      sending_.MoveTo(response_.mutable_tokens());
      StartWrite(&response_);
      return;
    case Send::kFinished:
      rpc_->AddTrailingMetadata("x-tokens-sent", absl::StrCat(tokens_sent));
      SendFinished(finish);
      return;
    case Send::kStatus:
      FinishWith(status, tokens_sent);
      return;
  }
}

absl::Status GenerateCall::FinalStatus() {
  if (too_slow_) {
    absl::Status status = absl::ResourceExhaustedError(
        absl::StrCat("the stream's reader is too slow; ", kUnsentBytesMax, " bytes may wait"));
    SetErrorInfo(&status, reason::kSlowReader);
    return status;
  }
  if (finish_.has_value() && !finish_->status.ok()) return WithFinishReason(finish_->status);
  return absl::CancelledError("the caller ended the stream");
}

void GenerateCall::SendFinished(const engine::Finish& finish) {
  worker::v1::Finished* message = response_.mutable_finished();
  message->set_reason(finish.reason == engine::FinishReason::kStop
                          ? worker::v1::FINISH_REASON_STOP
                          : worker::v1::FINISH_REASON_LENGTH);
  message->set_completion_tokens(static_cast<uint32_t>(finish.completion_tokens));
  message->set_cached_prompt_tokens(static_cast<uint32_t>(finish.cached_prompt_tokens));
  message->set_preemptions(static_cast<uint32_t>(finish.preemptions));
  *message->mutable_queue() = ToProto(finish.queue);
  *message->mutable_prefill() = ToProto(finish.prefill);
  *message->mutable_decode() = ToProto(finish.decode);
  StartWriteAndFinish(&response_, grpc::WriteOptions(), grpc::Status::OK);
}

void GenerateCall::FinishWith(const absl::Status& status, uint64_t tokens_sent) {
  rpc_->AddTrailingMetadata("x-tokens-sent", absl::StrCat(tokens_sent));
  Finish(ToGrpcStatus(status));
}

}  // namespace nibble::rpc
