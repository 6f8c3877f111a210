#include "services/gateway/admission.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"

namespace nibble::gateway {
namespace {

namespace pb = inference::v1;

// Positions that one sequence can have: the context, or all of the KV blocks where they are fewer.
uint64_t ContextLimit(const worker::v1::GetModelInfoResponse& info) {
  const uint64_t pool = uint64_t{info.kv_blocks()} * info.block_tokens();
  return pool == 0 ? info.context_length() : std::min<uint64_t>(info.context_length(), pool);
}

// Enough of a prompt's end to know how its last character and its next word begin.
constexpr ptrdiff_t kContinuedTokens = 8;

std::string PromptField(const GenerationInput& input) {
  if (input.text != nullptr) return input.prefix + "text";
  if (input.token_ids != nullptr) return input.prefix + "token_ids.ids";
  return input.prefix + "messages";
}

void FillSampling(const pb::SamplingParams& asked, const SamplingDefaults& defaults,
                  uint32_t vocab_size, worker::v1::SamplingParams* applied) {
  applied->set_temperature(asked.has_temperature() ? asked.temperature() : defaults.temperature);
  applied->set_top_p(asked.has_top_p() ? asked.top_p() : defaults.top_p);
  const uint32_t top_k = asked.has_top_k() ? asked.top_k() : defaults.top_k;
  applied->set_top_k(top_k >= vocab_size ? 0 : top_k);  // all of them: off
  applied->set_min_p(asked.has_min_p() ? asked.min_p() : defaults.min_p);
  applied->set_typical_p(asked.has_typical_p() ? asked.typical_p() : defaults.typical_p);
  applied->set_presence_penalty(asked.has_presence_penalty() ? asked.presence_penalty()
                                                             : defaults.presence_penalty);
  applied->set_frequency_penalty(asked.has_frequency_penalty() ? asked.frequency_penalty()
                                                               : defaults.frequency_penalty);
  applied->set_repetition_penalty(asked.has_repetition_penalty() ? asked.repetition_penalty()
                                                                 : defaults.repetition_penalty);
  *applied->mutable_logit_bias() = asked.logit_bias();
}

// The request's own stop ids and, unless they are ignored, the model's end-of-sequence ids.
std::vector<int32_t> StopIds(const pb::StoppingCriteria& stopping, const ServedModel& model) {
  std::vector<int32_t> ids;
  for (const uint32_t id : stopping.stop_token_ids()) ids.push_back(static_cast<int32_t>(id));
  if (!stopping.ignore_eos()) {
    ids.insert(ids.end(), model.defaults.eos_ids.begin(), model.defaults.eos_ids.end());
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

}  // namespace

GenerationInput InputOf(const pb::GenerateRequest& request, std::string prefix) {
  GenerationInput input{.prefix = std::move(prefix),
                        .model = &request.model(),
                        .request_id = &request.request_id(),
                        .sampling = &request.sampling(),
                        .stopping = &request.stopping(),
                        .output = &request.output()};
  if (request.has_queue_timeout()) input.queue_timeout = &request.queue_timeout();
  input.bypass_prefix_cache = request.bypass_prefix_cache();
  if (request.prompt_case() == pb::GenerateRequest::kText) input.text = &request.text();
  if (request.prompt_case() == pb::GenerateRequest::kTokenIds) {
    input.token_ids = &request.token_ids();
  }
  return input;
}

GenerationInput InputOf(const pb::ChatRequest& request, std::string prefix) {
  GenerationInput input{.prefix = std::move(prefix),
                        .model = &request.model(),
                        .request_id = &request.request_id(),
                        .sampling = &request.sampling(),
                        .stopping = &request.stopping(),
                        .output = &request.output()};
  if (request.has_queue_timeout()) input.queue_timeout = &request.queue_timeout();
  input.bypass_prefix_cache = request.bypass_prefix_cache();
  input.messages = &request.messages();
  if (request.has_tools_json()) input.tools_json = &request.tools_json();
  return input;
}

worker::v1::GenerateRequest AdmittedRequest::WorkerRequest(uint32_t choice) const {
  CHECK(choice < n_);
  worker::v1::GenerateRequest request = worker_request_;
  request.set_seed(seed_ + choice);
  return request;
}

pb::Started AdmittedRequest::NewStarted() const {
  pb::Started started;
  started.set_prompt_tokens(prompt_tokens());
  started.set_seed(seed_);
  started.set_max_tokens(max_tokens());
  started.set_model(model_->name());
  const worker::v1::SamplingParams& applied = worker_request_.sampling();
  pb::SamplingParams* sampling = started.mutable_sampling();
  sampling->set_temperature(applied.temperature());
  sampling->set_top_p(applied.top_p());
  sampling->set_top_k(applied.top_k());
  sampling->set_min_p(applied.min_p());
  sampling->set_typical_p(applied.typical_p());
  sampling->set_presence_penalty(applied.presence_penalty());
  sampling->set_frequency_penalty(applied.frequency_penalty());
  sampling->set_repetition_penalty(applied.repetition_penalty());
  sampling->set_seed(seed_);
  sampling->set_n(n_);
  *sampling->mutable_logit_bias() = applied.logit_bias();
  return started;
}

bool AdmittedRequest::IsEos(int32_t token_id) const {
  return std::binary_search(model_->defaults.eos_ids.begin(), model_->defaults.eos_ids.end(),
                            token_id);
}

absl::Status Admission::CheckContext(const GenerationInput& input, const ServedModel& model,
                                     size_t prompt_tokens) const {
  const uint64_t limit = ContextLimit(model.info);
  const uint64_t asked = input.stopping->has_max_tokens() ? input.stopping->max_tokens() : 1;
  if (prompt_tokens + asked <= limit) return absl::OkStatus();
  const ErrorMetadata metadata = {{"context_length", absl::StrCat(limit)},
                                  {"prompt_tokens", absl::StrCat(prompt_tokens)},
                                  {"max_tokens", absl::StrCat(asked)}};
  FieldViolation violation;
  if (prompt_tokens >= limit) {
    violation = {PromptField(input), absl::StrCat("has ", prompt_tokens, " tokens; limit is ",
                                                  limit - std::min<uint64_t>(limit, 1))};
  } else {
    violation = {
        input.prefix + "stopping.max_tokens",
        absl::StrCat("is ", asked, "; with ", prompt_tokens, " prompt tokens the context of ",
                     limit, " leaves ", limit - prompt_tokens)};
  }
  absl::Status status = InvalidFieldsError({&violation, 1}, reason::kContextLengthExceeded);
  SetErrorInfo(&status, reason::kContextLengthExceeded, metadata);
  return status;
}

absl::StatusOr<AdmittedRequest> Admission::Admit(const GenerationInput& input,
                                                 std::shared_ptr<const ServedModel> model,
                                                 std::span<const int32_t> prompt,
                                                 uint64_t drawn_seed) const {
  if (prompt.empty()) {
    const FieldViolation violation = {PromptField(input), "has no tokens"};
    return InvalidFieldsError({&violation, 1});
  }
  RETURN_IF_ERROR(CheckContext(input, *model, prompt.size()));
  const pb::StoppingCriteria& stopping = *input.stopping;
  const uint64_t left = ContextLimit(model->info) - prompt.size();
  const uint32_t max_tokens =
      stopping.has_max_tokens() ? stopping.max_tokens() : static_cast<uint32_t>(left);
  if (stopping.min_tokens() > max_tokens) {
    const FieldViolation violation = {
        input.prefix + "stopping.min_tokens",
        absl::StrCat("is ", stopping.min_tokens(), "; the context leaves ", max_tokens)};
    return InvalidFieldsError({&violation, 1});
  }

  AdmittedRequest admitted;
  admitted.seed_ = input.sampling->has_seed() ? input.sampling->seed() : drawn_seed;
  admitted.n_ = input.sampling->has_n() ? input.sampling->n() : 1;
  admitted.token_ids_ = input.output->token_ids();

  worker::v1::GenerateRequest& request = admitted.worker_request_;
  request.mutable_prompt_token_ids()->Add(prompt.begin(), prompt.end());
  FillSampling(*input.sampling, model->defaults.sampling, model->info.vocab_size(),
               request.mutable_sampling());
  request.set_max_tokens(max_tokens);
  request.set_min_tokens(stopping.min_tokens());
  if (input.output->has_logprobs()) request.set_logprobs(input.output->logprobs());
  if (input.queue_timeout != nullptr) *request.mutable_queue_timeout() = *input.queue_timeout;
  request.set_bypass_prefix_cache(input.bypass_prefix_cache);

  DecoderOptions& decoder = admitted.decoder_;
  decoder.text = !input.output->has_text() || input.output->text();
  decoder.skip_special_tokens =
      !input.output->has_skip_special_tokens() || input.output->skip_special_tokens();
  decoder.include_stop = stopping.include_stop();
  decoder.stops.assign(stopping.stop().begin(), stopping.stop().end());
  decoder.stop_ids = StopIds(stopping, *model);
  decoder.min_tokens = static_cast<int32_t>(stopping.min_tokens());
  if (input.messages == nullptr) {
    // A raw prompt is continued; an answer in a chat begins a text of its own.
    decoder.before.assign(prompt.end() - std::min<ptrdiff_t>(kContinuedTokens, std::ssize(prompt)),
                          prompt.end());
  }
  request.mutable_stop_token_ids()->Add(decoder.stop_ids.begin(), decoder.stop_ids.end());
  admitted.model_ = std::move(model);
  return admitted;
}

}  // namespace nibble::gateway
