#include "worker/engine/loop_engine.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "base/check.h"
#include "base/logging.h"
#include "base/status.h"

namespace nibble::engine {
namespace {

using scheduling::EndReason;
using scheduling::Event;
using scheduling::EventKind;

// A chunk is never fitted to fewer tokens.
constexpr int32_t kChunkTokensMin = step::kBlockTokens;

// A slot's setup must fit into one record of a plan channel beside the rest of the plan.
constexpr size_t kSetupBytesMax = size_t{3} << 20;

scheduling::SchedulerOptions SchedulerOptionsOf(const EngineOptions& options,
                                                const step::ExecutorLimits& limits) {
  return {
      .limits = limits,
      .prefill_chunk_tokens = options.prefill_chunk_tokens,
      .kv_watermark = options.kv_watermark,
      .prefix = {
          .on = options.prefix_cache, .key = options.prefix_key, .model = options.model_identity}};
}

double Seconds(Duration duration) { return std::chrono::duration<double>(duration).count(); }

bool AllInVocabulary(const std::vector<int32_t>& ids, int32_t vocab_size) {
  return std::all_of(ids.begin(), ids.end(),
                     [vocab_size](int32_t id) { return id >= 0 && id < vocab_size; });
}

absl::Status StatusOf(EndReason reason, const std::string& end_reason) {
  switch (reason) {
    case EndReason::kStop:
    case EndReason::kLength:
      return absl::OkStatus();
    case EndReason::kCancelled:
      return absl::CancelledError("the request was cancelled");
    case EndReason::kExpired:
      return absl::DeadlineExceededError("the request's deadline passed");
    case EndReason::kQueueTimeout:
      return absl::ResourceExhaustedError("the request was not admitted within its queue timeout");
    case EndReason::kNonFinite:
      return absl::InternalError("the model's logits are not finite");
    case EndReason::kGroupEnded:
      return absl::UnavailableError(end_reason);
  }
  CheckFailed(__FILE__, __LINE__, "reason", "unknown");
}

}  // namespace

std::unique_ptr<Engine> Engine::Create(const EngineOptions& options, step::Executor* executor,
                                       step::PlanPublisher* publisher, const Clock* clock,
                                       step::EngineStats* stats) {
  return std::make_unique<LoopEngine>(options, executor, publisher, clock, stats);
}

LoopEngine::LoopEngine(const EngineOptions& options, step::Executor* executor,
                       step::PlanPublisher* publisher, const Clock* clock, step::EngineStats* stats)
    : executor_(executor),
      publisher_(publisher),
      clock_(clock),
      stats_(stats),
      options_(options),
      inbox_({.queue_size = options.queue_size, .queue_prompt_tokens = options.queue_prompt_tokens},
             stats),
      scheduler_(SchedulerOptionsOf(options, executor->limits())) {
  CHECK(clock_ != nullptr);
  CHECK(stats_ != nullptr);
  CHECK(options_.queue_size > 0);
  UpdateGauges();
}

LoopEngine::~LoopEngine() { EndEverything("the worker stops"); }

absl::Status LoopEngine::CheckRequest(const Request& request) const {
  const step::ExecutorLimits& limits = executor_->limits();
  const auto context = static_cast<size_t>(scheduling::ContextTokens(limits));
  const size_t prompt = request.prompt.size();
  if (prompt >= context) {
    stats_->rejected[step::kTooLong].Add();
    return absl::InvalidArgumentError(absl::StrCat("prompt has ", prompt, " tokens; limit is ",
                                                   std::max<size_t>(context, 1) - 1));
  }
  const auto invalid = [this](absl::string_view message) {
    stats_->rejected[step::kInvalid].Add();
    return absl::InvalidArgumentError(message);
  };
  if (prompt == 0) return invalid("prompt is empty");
  if (request.max_tokens < 1) return invalid("max_tokens must be at least 1");
  if (request.min_tokens < 0) return invalid("min_tokens must not be negative");
  if (request.logprobs < -1 || request.logprobs > step::kMaxLogprobs) {
    return invalid(absl::StrCat("logprobs must be at most ", step::kMaxLogprobs));
  }
  // An id outside the vocabulary would reach into an executor's tables.
  if (!AllInVocabulary(request.prompt, limits.vocab_size)) {
    return invalid("prompt has a token id outside the vocabulary");
  }
  if (!AllInVocabulary(request.stop_ids, limits.vocab_size)) {
    return invalid("stop ids have a token id outside the vocabulary");
  }
  for (const step::LogitBias& bias : request.sampling.logit_bias) {
    if (bias.token_id < 0 || bias.token_id >= limits.vocab_size) {
      return invalid("logit_bias has a token id outside the vocabulary");
    }
  }
  const size_t history = std::min(context, prompt + static_cast<size_t>(request.max_tokens));
  const size_t setup_bytes = (history + request.stop_ids.size()) * sizeof(int32_t) +
                             request.sampling.logit_bias.size() * sizeof(step::LogitBias);
  if (setup_bytes > kSetupBytesMax) {
    return invalid(absl::StrCat("tokens, stop ids and logit_bias take ", setup_bytes,
                                " bytes in a plan; limit is ", kSetupBytesMax));
  }
  return absl::OkStatus();
}

absl::StatusOr<RequestId> LoopEngine::Submit(Request request, std::shared_ptr<Sink> sink) {
  CHECK(sink != nullptr);
  RETURN_IF_ERROR(CheckRequest(request));
  return inbox_.Submit(std::move(request), std::move(sink), clock_->Now());
}

void LoopEngine::Cancel(RequestId id) { inbox_.Cancel(id); }

void LoopEngine::Drain() {
  inbox_.Close("the worker drains");
  stats_->draining.Set(1);
}

void LoopEngine::Stop() { inbox_.Stop(); }

Load LoopEngine::GetLoad() const {
  Load load = {
      .running = static_cast<int32_t>(stats_->requests_running.Get()),
      .waiting = static_cast<int32_t>(stats_->requests_waiting.Get()),
      .waiting_prompt_tokens = stats_->waiting_prompt_tokens.Get(),
      .kv_blocks_used = static_cast<int32_t>(stats_->kv_blocks_used.Get()),
      .kv_blocks_total = static_cast<int32_t>(stats_->kv_blocks_total.Get()),
      .draining = stats_->draining.Get() != 0,
      .ready = stats_->ready.Get() != 0,
  };
  for (const Counter& steps : stats_->steps) load.steps += steps.Get();
  return load;
}

absl::Status LoopEngine::Run() {
  RETURN_IF_ERROR(failed_);
  stats_->ready.Set(1);
  while (!inbox_.stopping()) {
    const absl::StatusOr<bool> worked = RunStep();
    RETURN_IF_ERROR(worked.status());
    if (!*worked) inbox_.WaitForWork();
  }
  // No step is left behind on any rank.
  while (scheduler_.in_flight() > 0) {
    absl::Status status = Retire();
    if (!status.ok()) return Fail(std::move(status));
  }
  EndEverything("the worker stops");
  if (publisher_ == nullptr) return absl::OkStatus();
  return publisher_->Stop();
}

absl::StatusOr<bool> LoopEngine::RunStep() {
  RETURN_IF_ERROR(failed_);
  absl::StatusOr<bool> worked = Turn();
  if (!worked.ok()) return Fail(worked.status());
  // Otherwise nobody would ever wake it up.
  CHECK(*worked || scheduler_.running() + scheduler_.waiting() == 0);
  return worked;
}

absl::StatusOr<bool> LoopEngine::Turn() {
  bool worked = DrainInbox();
  now_ = clock_->Now();
  scheduler_.Expire(now_);
  const auto step = scheduler_.Schedule(&plan_);
  Deliver();
  if (step.has_value()) RETURN_IF_ERROR(Launch(*step));
  const int32_t in_flight = scheduler_.in_flight();
  if (in_flight == 2 || (in_flight == 1 && !step.has_value())) {
    RETURN_IF_ERROR(Retire());
    worked = true;
  }
  UpdateGauges();
  return worked || step.has_value();
}

bool LoopEngine::DrainInbox() {
  inbox_.Take(&submissions_, &cancels_);
  for (Submission& submission : submissions_) Accept(std::move(submission));
  for (const RequestId id : cancels_) scheduler_.Cancel(id);
  return !submissions_.empty() || !cancels_.empty();
}

void LoopEngine::Accept(Submission submission) {
  const size_t place = PlaceOf(submission.id);
  if (place >= active_.size()) active_.resize(place + 1);
  Request& request = submission.request;
  active_[place] = {.id = submission.id,
                    .sink = std::move(submission.sink),
                    .prompt_tokens = static_cast<int32_t>(request.prompt.size()),
                    .submitted = submission.submitted};
  scheduler_.Add({.id = submission.id,
                  .prompt = std::move(request.prompt),
                  .sampling = std::move(request.sampling),
                  .seed = request.seed,
                  .max_tokens = request.max_tokens,
                  .min_tokens = request.min_tokens,
                  .stop_ids = std::move(request.stop_ids),
                  .logprobs = request.logprobs,
                  .deadline = request.deadline,
                  .queue_deadline = request.queue_deadline,
                  .tenant = std::move(request.tenant),
                  .priority = request.priority,
                  .prefix_salt = std::move(request.prefix_salt),
                  .bypass_prefix_cache = request.bypass_prefix_cache});
}

absl::Status LoopEngine::Launch(const scheduling::PlannedStep& step) {
  if (publisher_ != nullptr) RETURN_IF_ERROR(publisher_->Publish(plan_));
  RETURN_IF_ERROR(executor_->Launch(plan_));
  // After a time without work the last step's stamp is old; that is no hang.
  if (scheduler_.in_flight() == 1) stats_->last_step_ns.Set(now_.time_since_epoch().count());
  launched_[step.step_id % 2] = {.step = step, .at = now_};
  return absl::OkStatus();
}

absl::Status LoopEngine::Retire() {
  RETURN_IF_ERROR(executor_->Wait(clock_->Now() + options_.step_deadline, &result_));
  now_ = clock_->Now();
  const uint64_t step_id = ++retired_step_;
  CountStep(launched_[step_id % 2]);
  RETURN_IF_ERROR(scheduler_.Commit(result_));
  Deliver();
  return absl::OkStatus();
}

// Steps overlap: one lasts from its launch, or from the end of the one before it.
void LoopEngine::CountStep(const Launched& launched) {
  const Duration lasted = now_ - std::max(launched.at, last_retired_);
  last_retired_ = now_;
  stats_->last_step_ns.Set(now_.time_since_epoch().count());
  stats_->steps[launched.step.kind].Add();
  stats_->step_seconds[launched.step.kind].Observe(step::kStepSecondsBounds, Seconds(lasted));
  stats_->step_tokens.Observe(step::kStepTokensBounds, launched.step.tokens);
  if (launched.step.kind != step::kDecodeStep) FitChunkToRate(launched.step.tokens, lasted);
}

void LoopEngine::FitChunkToRate(int32_t tokens, Duration lasted) {
  // Small steps say little about large ones.
  if (options_.prefill_chunk_time == Duration(0) || tokens < kChunkTokensMin) return;
  const double measured = tokens / std::max(Seconds(lasted), 1e-6);
  tokens_per_second_ = tokens_per_second_ == 0 ? measured : (tokens_per_second_ + measured) / 2;
  const double fitting = tokens_per_second_ * Seconds(options_.prefill_chunk_time);
  const int32_t limit = options_.prefill_chunk_tokens;
  scheduler_.LimitPrefill(
      fitting >= limit ? limit : std::max(static_cast<int32_t>(fitting), kChunkTokensMin));
}

void LoopEngine::Deliver() {
  for (const Event& event : scheduler_.events()) {
    Active& active = active_[PlaceOf(event.id)];
    CHECK(active.id == event.id);
    switch (event.kind) {
      case EventKind::kAdmitted:
        DeliverAdmitted(event, &active);
        break;
      case EventKind::kPreempted:
        stats_->preemptions.Add();
        break;
      case EventKind::kToken:
        DeliverToken(event, &active);
        break;
      case EventKind::kEnded:
        DeliverEnd(event, &active);
        break;
    }
  }
  scheduler_.ClearEvents();
  if (!left_queue_.empty()) {
    inbox_.LeaveQueue(left_queue_);
    left_queue_.clear();
  }
  if (!ended_.empty()) {
    inbox_.Release(ended_);
    ended_.clear();
  }
}

void LoopEngine::DeliverAdmitted(const Event& event, Active* active) {
  active->cached_tokens = event.cached_tokens;
  stats_->prefix_queried_tokens.Add(static_cast<uint64_t>(event.queried_tokens));
  stats_->prefix_hit_tokens.Add(static_cast<uint64_t>(event.cached_tokens));
  active->admitted = now_;
  left_queue_.push_back(active->id);
  stats_->requests_running.Add(1);
  stats_->queue_seconds.Observe(step::kTtftSecondsBounds, Seconds(now_ - active->submitted));
  active->sink->OnAdmitted(event.cached_tokens);
}

void LoopEngine::DeliverToken(const Event& event, Active* active) {
  if (active->output_tokens++ == 0) {
    active->first_token = now_;
    stats_->prompt_tokens.Add(static_cast<uint64_t>(active->prompt_tokens - active->cached_tokens));
    stats_->cached_prompt_tokens.Add(static_cast<uint64_t>(active->cached_tokens));
    stats_->time_to_first_token.Observe(step::kTtftSecondsBounds,
                                        Seconds(now_ - active->submitted));
  } else {
    stats_->inter_token.Observe(step::kInterTokenSecondsBounds, Seconds(now_ - active->last_token));
  }
  active->last_token = now_;
  stats_->generated_tokens.Add();
  const std::span top(result_.top_logprobs);
  const OutputToken token = {.token_id = event.token_id,
                             .logprob = event.logprob,
                             .top = top.subspan(static_cast<size_t>(event.top_begin),
                                                static_cast<size_t>(event.top_count))};
  active->sink->OnTokens(std::span(&token, 1));
}

void LoopEngine::DeliverEnd(const Event& event, Active* active) {
  CHECK(event.output_count == active->output_tokens);
  if (event.was_admitted) {
    stats_->requests_running.Add(-1);
  } else {
    left_queue_.push_back(active->id);
  }
  CountEnd(event, *active);
  ended_.push_back(active->id);
  active->id = 0;
  // The reference is given up after the call, and before the place can be used again.
  const std::shared_ptr<Sink> sink = std::move(active->sink);
  sink->OnFinished(MakeFinish(event, *active));
}

Finish LoopEngine::MakeFinish(const Event& event, const Active& active) const {
  Finish finish = {
      .status = StatusOf(event.reason, end_reason_),
      .reason = event.reason == EndReason::kLength ? FinishReason::kLength : FinishReason::kStop,
      .completion_tokens = event.output_count,
      .cached_prompt_tokens = active.cached_tokens,
      .preemptions = event.preemptions};
  finish.queue = (event.was_admitted ? active.admitted : now_) - active.submitted;
  if (!event.was_admitted) return finish;
  finish.prefill = (event.output_count > 0 ? active.first_token : now_) - active.admitted;
  if (event.output_count > 0) finish.decode = now_ - active.first_token;
  return finish;
}

void LoopEngine::CountEnd(const Event& event, const Active& active) {
  switch (event.reason) {
    case EndReason::kStop:
      stats_->requests_finished_stop.Add();
      break;
    case EndReason::kLength:
      stats_->requests_finished_length.Add();
      break;
    case EndReason::kCancelled:
      stats_->requests_cancelled.Add();
      break;
    case EndReason::kExpired:
      stats_->requests_expired.Add();
      break;
    case EndReason::kQueueTimeout:
      stats_->rejected[step::kQueueTimeout].Add();
      break;
    case EndReason::kNonFinite:
      stats_->nonfinite_rows.Add();
      stats_->requests_failed.Add();
      break;
    case EndReason::kGroupEnded:
      stats_->requests_failed.Add();
      break;
  }
  if (event.reason == EndReason::kStop || event.reason == EndReason::kLength) {
    stats_->request_seconds.Observe(step::kRequestSecondsBounds, Seconds(now_ - active.submitted));
  }
}

void LoopEngine::UpdateGauges() {
  const scheduling::BlockPool& blocks = scheduler_.blocks();
  stats_->kv_blocks_used.Set(blocks.used());
  stats_->kv_blocks_free.Set(blocks.free());
  stats_->kv_blocks_cached.Set(blocks.cached());
  stats_->kv_blocks_quarantined.Set(blocks.quarantined());
  stats_->kv_blocks_total.Set(blocks.total());
  stats_->slots_used.Set(scheduler_.running());
  stats_->steps_in_flight.Set(scheduler_.in_flight());
}

void LoopEngine::EndEverything(const std::string& reason) {
  end_reason_ = reason;
  inbox_.Close(reason);
  stats_->ready.Set(0);
  now_ = clock_->Now();
  DrainInbox();
  scheduler_.EndAll(EndReason::kGroupEnded);
  Deliver();
  UpdateGauges();
}

absl::Status LoopEngine::Fail(absl::Status status) {
  failed_ = status;
  spdlog::error("the engine ends: {}", std::string(status.message()));
  EndEverything("the worker group ends");
  return status;
}

}  // namespace nibble::engine
