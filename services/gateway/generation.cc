#include "services/gateway/generation.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/grpc_status.h"
#include "base/logging.h"
#include "base/status.h"
#include "services/gateway/prompt_encoding.h"

namespace nibble::gateway {
namespace {

namespace pb = inference::v1;

double Seconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }

FinishLabel LabelOf(pb::FinishReason reason) {
  switch (reason) {
    case pb::FINISH_REASON_STOP:
      return FinishLabel::kStop;
    case pb::FINISH_REASON_LENGTH:
      return FinishLabel::kLength;
    case pb::FINISH_REASON_EOS:
      return FinishLabel::kEos;
    case pb::FINISH_REASON_STOP_STRING:
      return FinishLabel::kStopString;
    default:
      return FinishLabel::kNone;
  }
}

std::optional<Rejection> RejectionOf(const absl::Status& status) {
  const std::string reason = ErrorReason(status);
  if (reason == reason::kContextLengthExceeded) return Rejection::kContextLength;
  if (reason == reason::kModelNotFound) return Rejection::kUnknownModel;
  if (reason == reason::kNoWorker) return Rejection::kNoWorker;
  if (reason == reason::kOverloaded) return Rejection::kOverloaded;
  if (reason == reason::kDraining) return Rejection::kDraining;
  if (reason == reason::kUnauthenticated) return Rejection::kUnauthenticated;
  if (reason == reason::kPermissionDenied) return Rejection::kForbidden;
  if (reason == reason::kQuota) return Rejection::kQuota;
  if (reason == reason::kQueueFull) return Rejection::kQueueFull;
  if (status.code() == absl::StatusCode::kInvalidArgument) return Rejection::kInvalid;
  return std::nullopt;
}

worker::v1::Priority OnTheWire(Priority priority) {
  switch (priority) {
    case Priority::kLow:
      return worker::v1::PRIORITY_LOW;
    case Priority::kNormal:
      return worker::v1::PRIORITY_NORMAL;
    case Priority::kHigh:
      return worker::v1::PRIORITY_HIGH;
  }
  return worker::v1::PRIORITY_UNSPECIFIED;
}

void NameCaller(const Caller& caller, worker::v1::GenerateRequest* request) {
  request->set_tenant(caller.tenant->name());
  request->set_priority(OnTheWire(caller.key.priority));
  request->set_prefix_salt(caller.tenant->prefix_salt());
}

void SetDuration(Duration value, google::protobuf::Duration* duration) {
  constexpr int64_t kNanosPerSecond = 1'000'000'000;
  duration->set_seconds(value.count() / kNanosPerSecond);
  duration->set_nanos(static_cast<int32_t>(value.count() % kNanosPerSecond));
}

}  // namespace

absl::StatusOr<std::shared_ptr<const ServedModel>> ModelOrStatus(Core* core, const Caller* caller,
                                                                 const Resolution& resolution,
                                                                 const std::string& name,
                                                                 const std::string& field) {
  // By its name alone where one is given, so that the answer does not say what else is served.
  if (caller != nullptr && !name.empty() && !caller->MayUse(name)) {
    return PermissionDeniedError("this model");
  }
  switch (resolution.outcome) {
    case Resolution::Outcome::kFound:
      if (caller != nullptr && !caller->MayUse(resolution.model->name())) {
        return PermissionDeniedError("this model");
      }
      return resolution.model;
    case Resolution::Outcome::kUnknown:
      return UnknownModelError(name);
    case Resolution::Outcome::kAmbiguous:
      return ModelNotNamedError(field);
    case Resolution::Outcome::kNotYet:
      break;
  }
  return NoGroupReadyError(core->RetryDelay());
}

Duration Generation::TimeLeft() const {
  if (options_.deadline == Deadline::max()) return Duration::max();
  return options_.deadline - core_.clock->Now();
}

absl::StatusOr<std::shared_ptr<const ServedModel>> Generation::CheckRequest() {
  const GenerationInput& input = input_.input;
  const Resolution resolution = core_.router.Resolve(*input.model);
  const auto violations = core_.admission.CheckFields(input, resolution.model.get());
  if (!violations.empty()) return InvalidFieldsError(violations);
  return ModelOrStatus(&core_, caller_.get(), resolution, *input.model, input.prefix + "model");
}

absl::Status Generation::CheckRoom(const ServedModel& model) const {
  if (const auto limit = core_.router.Full(model)) return QueueFullError(*limit);
  return absl::OkStatus();
}

void Generation::Begin(OwnedInput input, std::shared_ptr<const Caller> caller) {
  input_ = std::move(input);
  caller_ = std::move(caller);
  auto model = CheckRequest();
  if (model.ok() && caller_ != nullptr) {
    absl::Status quota = caller_->tenant->CheckQuota(core_.clock->Now());
    if (!quota.ok()) model = std::move(quota);
  }
  // Before any queue, so that who is refused hears of it at once.
  if (model.ok()) {
    absl::Status room = CheckRoom(**model);
    if (!room.ok()) model = std::move(room);
  }
  absl::MutexLock lock(&mutex_);
  if (ended_) return;  // cut by the end of a drain since it entered
  if (!model.ok()) return End(model.status());
  request_id_ = input_.input.request_id->empty() ? core_.random.NextId() : *input_.input.request_id;
  model_metrics_ = &core_.metrics.ForModel((*model)->name());
  const bool queued =
      core_.pool.Submit(input_.message->ByteSizeLong(),
                        [self = shared_from_this(), model = *model] { self->Prepare(model); });
  if (!queued) {
    End(OverloadedError("texts to tokenize", static_cast<int64_t>(core_.limits.tokenize_queue)));
  }
}

absl::StatusOr<AdmittedRequest> Generation::EncodeAndAdmit(
    std::shared_ptr<const ServedModel> model) {
  if (TimeLeft() <= core_.limits.deadline_margin) return DeadlineError();
  const Deadline begin = core_.clock->Now();
  ASSIGN_OR_RETURN(const std::vector<int32_t> prompt,
                   EncodePrompt(*model, input_.input, core_.today()));
  core_.metrics.tokenize_seconds->Observe(Seconds(core_.clock->Now() - begin));
  return core_.admission.Admit(input_.input, std::move(model), prompt, core_.random.Next());
}

void Generation::Prepare(std::shared_ptr<const ServedModel> model) {
  {
    absl::MutexLock lock(&mutex_);
    if (ended_) return;
  }
  auto admitted = EncodeAndAdmit(std::move(model));
  absl::MutexLock lock(&mutex_);
  if (ended_) return;
  if (!admitted.ok()) return End(admitted.status());
  // It may have filled up meanwhile.
  if (absl::Status room = CheckRoom(admitted->model()); !room.ok()) return End(std::move(room));
  request_.emplace(*std::move(admitted));
  input_ = {};
  model_metrics_->requests_inflight->Increment();
  model_metrics_->prompt_tokens->Increment(request_->prompt_tokens());
  if (caller_ != nullptr) {
    caller_->tenant->ChargePrompt(request_->prompt_tokens(), core_.clock->Now());
  }
  if (TimeLeft() <= core_.limits.deadline_margin) return End(DeadlineError());
  queued_ = true;
  model_metrics_->queue_depth[static_cast<size_t>(ClassOf())]->Increment();
  if (!StartAttempt(std::nullopt)) End(NoGroupReadyError(core_.RetryDelay()));
}

bool Generation::StartAttempt(std::optional<size_t> excluded) {
  const Deadline begin = core_.clock->Now();
  const auto group = core_.router.Pick(request_->model(), request_->n(), excluded);
  if (!group.has_value()) return false;
  DropCalls();
  group_ = group;
  ++attempt_;
  sent_ = core_.clock->Now();
  core_.metrics.route_seconds->Observe(Seconds(sent_ - begin));
  const WorkerMetrics& worker = core_.metrics.workers[*group_];
  (excluded.has_value() ? worker.routed_fallback : worker.routed_first)->Increment();
  Duration left = TimeLeft();
  if (left != Duration::max()) left -= core_.limits.deadline_margin;
  slots_ = std::vector<Slot>(request_->n());
  const std::string wire_id = core_.random.NextId();  // clients may use an id twice
  for (uint32_t i = 0; i < request_->n(); ++i) {
    worker::v1::GenerateRequest request = request_->WorkerRequest(i);
    request.set_request_id(wire_id + "-" + std::to_string(i));
    if (caller_ != nullptr) NameCaller(*caller_, &request);
    slots_[i].choice = std::make_unique<Choice>(&*request_, i);
    slots_[i].call = new UpstreamCall(shared_from_this(), &core_.upstreams,
                                      {.group = *group_, .attempt = attempt_, .choice = i});
    slots_[i].call->Start(core_.workers[*group_].get(), request, left);
  }
  return true;
}

void Generation::DropCalls() {
  for (Slot& slot : slots_) {
    if (slot.call == nullptr) continue;
    slot.call->Cancel();
    slot.call->LetGo();
  }
}

bool Generation::IsCurrent(const UpstreamCall& call) const {
  return !ended_ && call.place().attempt == attempt_;
}

void Generation::OnUpstreamRead(UpstreamCall* call, bool ok) {
  absl::MutexLock lock(&mutex_);
  if (!ok || !IsCurrent(*call) || slots_[call->place().choice].choice->ended()) {
    call->LetGo();  // what is left of it is its status
    return;
  }
  HandleMessage(call);
  // It may have ended everything, or begun another attempt.
  if (!IsCurrent(*call)) return call->LetGo();
  const bool ended = slots_[call->place().choice].choice->ended();
  if (!ended && options_.sink->Full()) return call->Pause();
  call->Read();
}

void Generation::Resume() {
  absl::MutexLock lock(&mutex_);
  if (ended_) return;
  for (Slot& slot : slots_) {
    if (slot.call != nullptr && slot.call->paused()) slot.call->Read();
  }
}

void Generation::SendStarted() {
  if (std::exchange(started_, true)) return;
  LeaveQueue();
  core_.metrics.upstream_seconds->Observe(Seconds(core_.clock->Now() - sent_));
  options_.sink->OnStarted(request_id_, request_->NewStarted());
}

void Generation::CountTokens(Slot* slot, int tokens) {
  const Deadline now = core_.clock->Now();
  committed_ = true;
  if (!slot->first_token.has_value()) {
    slot->first_token = now;
    if (tokens_ == 0) {
      model_metrics_->time_to_first_token_seconds[options_.streaming ? 1 : 0]->Observe(
          Seconds(now - options_.arrived));
    }
  } else {
    const double each = Seconds(now - slot->last_token) / tokens;
    for (int i = 0; i < tokens; ++i) model_metrics_->inter_token_seconds->Observe(each);
  }
  slot->last_token = now;
}

absl::StatusOr<Choice::Output> Generation::Decode(Choice* choice,
                                                  const worker::v1::GenerateResponse& response) {
  const Deadline begin = core_.clock->Now();
  auto output = response.has_tokens() ? choice->OnTokens(response.tokens())
                                      : choice->OnFinished(response.finished());
  detokenizing_ += core_.clock->Now() - begin;
  return output;
}

void Generation::HandleMessage(UpstreamCall* call) {
  const worker::v1::GenerateResponse& response = call->response();
  Slot& slot = slots_[call->place().choice];
  absl::StatusOr<Choice::Output> output = Choice::Output();
  const uint32_t before = slot.choice->token_count();
  switch (response.event_case()) {
    case worker::v1::GenerateResponse::kAdmitted:
      slot.choice->OnAdmitted(response.admitted());
      return SendStarted();
    case worker::v1::GenerateResponse::kTokens:
      if (response.tokens().ids().empty()) return;
      SendStarted();
      CountTokens(&slot, response.tokens().ids_size());
      output = Decode(slot.choice.get(), response);
      break;
    case worker::v1::GenerateResponse::kFinished:
      SendStarted();
      output = Decode(slot.choice.get(), response);
      break;
    case worker::v1::GenerateResponse::EVENT_NOT_SET:
      return;  // an event of a newer worker
  }
  if (!output.ok()) return HandleFailure(output.status());
  const uint32_t delivered = slot.choice->token_count() - before;
  tokens_ += delivered;
  model_metrics_->generated_tokens->Increment(delivered);
  if (caller_ != nullptr) caller_->tenant->ChargeGenerated(delivered, core_.clock->Now());
  Deliver(call, *std::move(output));
}

void Generation::Deliver(UpstreamCall* call, Choice::Output output) {
  if (output.delta.has_value()) {
    const absl::Status status = options_.sink->OnDelta(*std::move(output.delta));
    if (!status.ok()) return End(status);
  }
  if (output.abandon_worker) call->Cancel();
  if (!output.finished.has_value()) return;
  const Slot& slot = slots_[call->place().choice];
  pb::Finished& finished = *output.finished;
  if (slot.first_token.has_value()) {
    pb::Timings* timings = finished.mutable_timings();
    SetDuration(*slot.first_token - options_.arrived, timings->mutable_time_to_first_token());
    if (output.abandon_worker) {
      SetDuration(slot.last_token - *slot.first_token, timings->mutable_decode());
    }
  }
  finished.set_worker(core_.router.group_name(*group_));
  if (finished.index() == 0) finish_label_ = LabelOf(finished.reason());
  options_.sink->OnFinished(std::move(finished));
  if (++finished_ < request_->n()) return;
  core_.router.RecordOutcome(*group_, /*group_failed=*/false);
  End(absl::OkStatus());
}

void Generation::OnUpstreamDone(UpstreamCall* call, const absl::Status& status) {
  core_.router.Release(call->place().group, 1);
  absl::MutexLock lock(&mutex_);
  if (call->place().attempt != attempt_) return;
  Slot& slot = slots_[call->place().choice];
  slot.call = nullptr;
  if (ended_ || slot.choice->ended()) return;
  HandleFailure(status.ok() ? absl::UnavailableError("the stream ended without an end") : status);
}

bool Generation::Retry(UpstreamFault fault, bool leaving) {
  if (committed_ || attempt_ > 1 || TimeLeft() <= core_.limits.deadline_margin) return false;
  // The budget is for groups that die under load. A group that leaves has done nothing yet for
  // what it refuses, and a burst that meets its drain finds the others as loaded as before.
  if (!leaving && !core_.retry_budget.TryTake(static_cast<int64_t>(core_.calls.size()))) {
    return false;
  }
  if (!StartAttempt(*group_)) {
    if (!leaving) core_.retry_budget.Return();
    return false;
  }
  holds_retry_ = !leaving;
  (fault == UpstreamFault::kGroup ? core_.metrics.retries_worker_lost
                                  : core_.metrics.retries_engine_fault)
      ->Increment();
  return true;
}

void Generation::HandleFailure(const absl::Status& status) {
  const UpstreamFault fault = ClassifyUpstream(status);
  if (fault == UpstreamFault::kNone) return End(PassOn(status));
  if (fault == UpstreamFault::kDeadline) {
    core_.metrics.stream_cancelled[static_cast<size_t>(CancelledBy::kDeadline)]->Increment();
    return End(DeadlineError());
  }
  // A group that says it is leaving is not broken; its next beat will say so, too.
  const bool leaving = ErrorReason(status) == reason::kDraining;
  if (leaving) {
    core_.router.Leaving(*group_);
  } else {
    core_.router.RecordOutcome(*group_, true);
  }
  cause_ = core_.random.NextId();
  spdlog::warn("request {} failed on group {}: cause {}: {}: {}", request_id_,
               core_.router.group_name(*group_), cause_, StatusCodeName(status.code()),
               std::string(status.message()));
  if (Retry(fault, leaving)) return;
  if (fault == UpstreamFault::kEngine) return End(EngineFaultError(cause_));
  if (committed_) return End(WorkerLostError(options_.streaming ? tokens_ : 0));
  End(NoGroupReadyError(core_.RetryDelay()));
}

void Generation::Refuse(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  if (!ended_) End(status);
}

void Generation::Stop(const absl::Status& status, CancelledBy by, bool flush) {
  absl::MutexLock lock(&mutex_);
  if (ended_) return;
  core_.metrics.stream_cancelled[static_cast<size_t>(by)]->Increment();
  End(status, /*abandon=*/!flush);
}

void Generation::LeaveQueue() {
  if (!std::exchange(queued_, false)) return;
  model_metrics_->queue_depth[static_cast<size_t>(ClassOf())]->Decrement();
}

void Generation::End(absl::Status status, bool abandon) {
  CHECK(!ended_);
  ended_ = true;
  LeaveQueue();
  DropCalls();
  if (holds_retry_) core_.retry_budget.Return();
  Record(status);
  GenerationEnd end = {.status = std::move(status),
                       .tokens_delivered = tokens_,
                       .cause = cause_,
                       .request_id = request_id_,
                       .abandon = abandon};
  if (group_.has_value()) end.group = core_.router.group_name(*group_);
  options_.sink->OnEnd(std::move(end));
}

void Generation::Record(const absl::Status& status) {
  const double seconds = Seconds(core_.clock->Now() - options_.arrived);
  const ModelMetrics& model =
      model_metrics_ != nullptr ? *model_metrics_ : core_.metrics.ForModel("");
  core_.metrics.RequestEnded(model, status.code(), finish_label_);
  if (!request_.has_value() || attempt_ == 0) {
    if (const auto rejection = RejectionOf(status)) {
      core_.metrics.rejected[static_cast<size_t>(*rejection)]->Increment();
    }
  }
  uint32_t prompt_tokens = 0;
  if (request_.has_value()) {
    prompt_tokens = request_->prompt_tokens();
    model.requests_inflight->Decrement();
    model.request_seconds->Observe(seconds);
    model.prompt_tokens_histogram->Observe(prompt_tokens);
    model.generated_tokens_histogram->Observe(static_cast<double>(tokens_));
    if (committed_) core_.metrics.detokenize_seconds->Observe(Seconds(detokenizing_));
  }
  spdlog::info(
      "request {} {} {} reason \"{}\" prompt {} tokens, delivered {} in {:.3f} s, group {}",
      request_id_.empty() ? "-" : request_id_, RpcMethodName(options_.rpc),
      StatusCodeName(status.code()), ErrorReason(status), prompt_tokens, tokens_, seconds,
      group_.has_value() ? core_.router.group_name(*group_) : "-");
}

}  // namespace nibble::gateway
