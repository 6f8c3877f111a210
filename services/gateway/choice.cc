#include "services/gateway/choice.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"

namespace nibble::gateway {

namespace pb = inference::v1;

Choice::Choice(const AdmittedRequest* request, uint32_t index)
    : request_(*request),
      index_(index),
      decoder_(*request->model().tokenizer, request->NewDecoderOptions()) {}

void Choice::OnAdmitted(const worker::v1::Admitted& admitted) {
  cached_prompt_tokens_ = admitted.cached_prompt_tokens();
}

absl::Status Choice::CheckTokens(const worker::v1::Tokens& tokens) const {
  if (ended_ || stop_id_.has_value()) {
    return absl::InternalError("the worker sent tokens after the end of the sequence");
  }
  if (request_.wants_logprobs() && tokens.logprobs_size() != tokens.ids_size()) {
    return absl::InternalError("the worker sent tokens without their log-probabilities");
  }
  if (token_count() + static_cast<uint32_t>(tokens.ids_size()) > request_.max_tokens()) {
    return absl::InternalError("the worker sent more tokens than max_tokens");
  }
  return absl::OkStatus();
}

absl::Status Choice::FillLogprob(uint32_t token_id, float logprob, pb::TokenLogprob* entry) const {
  entry->set_token_id(token_id);
  entry->set_logprob(logprob);
  const auto id = static_cast<int32_t>(token_id);
  ASSIGN_OR_RETURN(std::string bytes, request_.model().tokenizer->TokenBytes(id));
  entry->set_token(std::move(bytes));
  return absl::OkStatus();
}

absl::Status Choice::AppendLogprobs(const worker::v1::TokenLogprobs& from, uint32_t token_id,
                                    pb::Delta* delta) const {
  pb::TokenLogprobs* logprobs = delta->add_logprobs();
  RETURN_IF_ERROR(FillLogprob(token_id, from.sampled(), logprobs->mutable_sampled()));
  for (const worker::v1::TokenLogprob& top : from.top()) {
    RETURN_IF_ERROR(FillLogprob(top.token_id(), top.logprob(), logprobs->add_top()));
  }
  return absl::OkStatus();
}

pb::Finished Choice::NewFinished() const {
  pb::Finished finished;
  finished.set_index(index_);
  pb::Usage* usage = finished.mutable_usage();
  usage->set_completion_tokens(token_count());
  if (index_ == 0) {
    usage->set_prompt_tokens(request_.prompt_tokens());
    usage->set_cached_prompt_tokens(cached_prompt_tokens_);
  }
  return finished;
}

absl::StatusOr<Choice::Output> Choice::OnTokens(const worker::v1::Tokens& tokens) {
  RETURN_IF_ERROR(CheckTokens(tokens));
  Output output;
  pb::Delta& delta = output.delta.emplace();
  delta.set_index(index_);
  StreamDecoder::End end = StreamDecoder::End::kNone;
  for (int i = 0; i < tokens.ids_size() && end == StreamDecoder::End::kNone; ++i) {
    const uint32_t id = tokens.ids(i);
    ASSIGN_OR_RETURN(end, decoder_.Push(static_cast<int32_t>(id), delta.mutable_text()));
    if (request_.wants_token_ids()) delta.add_token_ids(id);
    if (request_.wants_logprobs()) {
      RETURN_IF_ERROR(AppendLogprobs(tokens.logprobs(i), id, &delta));
    }
    if (end == StreamDecoder::End::kStopId) stop_id_ = id;
  }
  delta.set_completion_tokens(token_count());
  if (end == StreamDecoder::End::kStopString) {
    ended_ = true;
    output.abandon_worker = true;
    pb::Finished& finished = output.finished.emplace(NewFinished());
    finished.set_reason(pb::FINISH_REASON_STOP_STRING);
    finished.set_stop_string(decoder_.matched_stop());
  }
  return output;
}

absl::StatusOr<Choice::Output> Choice::OnFinished(const worker::v1::Finished& finished) {
  if (ended_) return absl::InternalError("the worker ended a sequence twice");
  const bool by_stop_id = finished.reason() == worker::v1::FINISH_REASON_STOP;
  if (by_stop_id != stop_id_.has_value()) {
    return absl::InternalError("the worker's finish reason does not fit its last token");
  }
  ended_ = true;
  Output output;
  pb::Finished& event = output.finished.emplace();
  StreamDecoder::End end = StreamDecoder::End::kNone;
  if (!by_stop_id) {
    std::string rest;
    ASSIGN_OR_RETURN(end, decoder_.Finish(&rest));
    if (!rest.empty()) {
      pb::Delta& delta = output.delta.emplace();
      delta.set_index(index_);
      delta.set_text(std::move(rest));
      delta.set_completion_tokens(token_count());
    }
  }
  event = NewFinished();
  if (end == StreamDecoder::End::kStopString) {
    event.set_reason(pb::FINISH_REASON_STOP_STRING);
    event.set_stop_string(decoder_.matched_stop());
  } else if (by_stop_id) {
    event.set_reason(request_.IsEos(static_cast<int32_t>(*stop_id_)) ? pb::FINISH_REASON_EOS
                                                                     : pb::FINISH_REASON_STOP);
    event.set_stop_token_id(*stop_id_);
  } else {
    event.set_reason(pb::FINISH_REASON_LENGTH);
  }
  pb::Timings* timings = event.mutable_timings();
  *timings->mutable_queue() = finished.queue();
  *timings->mutable_prefill() = finished.prefill();
  *timings->mutable_decode() = finished.decode();
  return output;
}

}  // namespace nibble::gateway
