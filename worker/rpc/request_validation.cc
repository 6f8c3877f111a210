#include "worker/rpc/request_validation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "base/api_keys.h"
#include "base/grpc_status.h"

namespace nibble::rpc {
namespace {

constexpr float kTemperatureMax = 100;
constexpr float kRepetitionPenaltyMin = 0.01f;
constexpr float kRepetitionPenaltyMax = 100;
constexpr size_t kPrefixSaltBytesMax = 32;

// Collects what is wrong, field by field.
class Violations {
 public:
  void Add(std::string field, std::string description) {
    list_.push_back({.field = std::move(field), .description = std::move(description)});
  }

  // NaN fails every comparison, hence the form of the conditions.
  void CheckRange(const char* field, float value, float min, float max) {
    if (!(value >= min && value <= max)) {
      Add(field, absl::StrCat("is ", value, "; allowed: ", min, " to ", max));
    }
  }

  void CheckShare(const char* field, float value) {
    if (!(value > 0 && value <= 1)) {
      Add(field, absl::StrCat("is ", value, "; allowed: above 0, up to 1"));
    }
  }

  void CheckCount(const char* field, int64_t count, int64_t max) {
    if (count > max) Add(field, absl::StrCat("has ", count, " entries; limit is ", max));
  }

  [[nodiscard]] const std::vector<FieldViolation>& list() const { return list_; }

 private:
  std::vector<FieldViolation> list_;
};

void CheckRequestId(const std::string& id, const RequestLimits& limits, Violations* violations) {
  if (id.size() > static_cast<size_t>(limits.request_id_bytes_max)) {
    violations->Add("request_id", absl::StrCat("has ", id.size(), " bytes; limit is ",
                                               limits.request_id_bytes_max));
  } else if (!std::all_of(id.begin(), id.end(), absl::ascii_isprint)) {
    // It stands in log lines.
    violations->Add("request_id", "holds bytes other than printable ASCII");
  }
}

// The first id that is no token, if any; one violation for a list, however long.
template <typename Ids>
void CheckIds(const char* field, const Ids& ids, int32_t vocab_size, Violations* violations) {
  const auto bad = std::find_if(ids.begin(), ids.end(), [vocab_size](uint32_t id) {
    return id >= static_cast<uint32_t>(vocab_size);
  });
  if (bad != ids.end()) {
    violations->Add(field, absl::StrCat("entry ", std::distance(ids.begin(), bad), " is ", *bad,
                                        "; the vocabulary has ", vocab_size, " tokens"));
  }
}

void ConvertLogitBias(const worker::v1::SamplingParams& from, const RequestLimits& limits,
                      step::SamplingParams* to, Violations* violations) {
  const char* const field = "sampling.logit_bias";
  violations->CheckCount(field, from.logit_bias_size(), limits.logit_bias_max);
  for (const auto& [id, bias] : from.logit_bias()) {
    if (id >= static_cast<uint32_t>(limits.vocab_size)) {
      violations->Add(field, absl::StrCat("names token ", id, "; the vocabulary has ",
                                          limits.vocab_size, " tokens"));
      return;
    }
    if (!(bias >= -100 && bias <= 100)) {
      violations->Add(field, absl::StrCat("of token ", id, " is ", bias, "; allowed: -100 to 100"));
      return;
    }
    to->logit_bias.push_back({.token_id = static_cast<int32_t>(id), .bias = bias});
  }
  // The map's order is random; the same request must make the same bytes on every attempt.
  std::sort(to->logit_bias.begin(), to->logit_bias.end(),
            [](const auto& a, const auto& b) { return a.token_id < b.token_id; });
}

step::SamplingParams ConvertSampling(const worker::v1::SamplingParams& from,
                                     const RequestLimits& limits, Violations* violations) {
  violations->CheckRange("sampling.temperature", from.temperature(), 0, kTemperatureMax);
  violations->CheckShare("sampling.top_p", from.top_p());
  violations->CheckRange("sampling.min_p", from.min_p(), 0, 1);
  violations->CheckShare("sampling.typical_p", from.typical_p());
  violations->CheckRange("sampling.presence_penalty", from.presence_penalty(), -2, 2);
  violations->CheckRange("sampling.frequency_penalty", from.frequency_penalty(), -2, 2);
  violations->CheckRange("sampling.repetition_penalty", from.repetition_penalty(),
                         kRepetitionPenaltyMin, kRepetitionPenaltyMax);
  step::SamplingParams to;
  to.temperature = from.temperature();
  to.top_p = from.top_p();
  to.min_p = from.min_p();
  to.typical_p = from.typical_p();
  // As many candidates as there are tokens is the same as no limit.
  const bool limited = from.top_k() < static_cast<uint32_t>(limits.vocab_size);
  to.top_k = limited ? static_cast<int32_t>(from.top_k()) : 0;
  to.presence_penalty = from.presence_penalty();
  to.frequency_penalty = from.frequency_penalty();
  to.repetition_penalty = from.repetition_penalty();
  ConvertLogitBias(from, limits, &to, violations);
  return to;
}

// An enumerator of a newer gateway counts as the ordinary class.
Priority ConvertPriority(worker::v1::Priority priority) {
  if (priority == worker::v1::PRIORITY_LOW) return Priority::kLow;
  return priority == worker::v1::PRIORITY_HIGH ? Priority::kHigh : Priority::kNormal;
}

void CheckTenant(const worker::v1::GenerateRequest& request, Violations* violations) {
  if (!request.tenant().empty() && !IsKeyName(request.tenant())) {
    violations->Add("tenant", "allowed: at most 64 of a-z, A-Z, 0-9, - and _");
  }
  if (request.prefix_salt().size() > kPrefixSaltBytesMax) {
    violations->Add("prefix_salt", absl::StrCat("has ", request.prefix_salt().size(),
                                                " bytes; limit is ", kPrefixSaltBytesMax));
  }
}

Deadline ConvertQueueTimeout(const worker::v1::GenerateRequest& request,
                             const RequestLimits& limits, Deadline now, Violations* violations) {
  if (!request.has_queue_timeout()) return now + limits.queue_wait_default;
  const google::protobuf::Duration& timeout = request.queue_timeout();
  const auto max_s = std::chrono::duration_cast<std::chrono::seconds>(limits.queue_wait_max);
  if (timeout.seconds() < 0 || timeout.seconds() > max_s.count() || timeout.nanos() < 0 ||
      timeout.nanos() > 999'999'999) {
    violations->Add("queue_timeout", absl::StrCat("allowed: 0 to ", max_s.count(), " s"));
    return now;
  }
  return now + std::chrono::seconds(timeout.seconds()) + std::chrono::nanoseconds(timeout.nanos());
}

absl::Status ContextError(int64_t prompt_tokens, int64_t max_tokens, int64_t max_context) {
  absl::Status status = absl::InvalidArgumentError(
      absl::StrCat("prompt has ", prompt_tokens, " tokens and max_tokens is ", max_tokens,
                   "; together the limit is ", max_context));
  SetErrorInfo(&status, reason::kContextLengthExceeded,
               {{"prompt_tokens", absl::StrCat(prompt_tokens)},
                {"max_tokens", absl::StrCat(max_tokens)},
                {"context_length", absl::StrCat(max_context)}});
  return status;
}

void CheckCounts(const worker::v1::GenerateRequest& request, const RequestLimits& limits,
                 Violations* violations) {
  constexpr uint32_t kInt32Max = std::numeric_limits<int32_t>::max();
  CheckRequestId(request.request_id(), limits, violations);
  if (request.prompt_token_ids().empty()) violations->Add("prompt_token_ids", "is empty");
  CheckIds("prompt_token_ids", request.prompt_token_ids(), limits.vocab_size, violations);
  if (request.max_tokens() < 1 || request.max_tokens() > kInt32Max) {
    violations->Add("max_tokens",
                    absl::StrCat("is ", request.max_tokens(), "; allowed: 1 to ", kInt32Max));
  }
  if (request.min_tokens() > request.max_tokens()) {
    violations->Add("min_tokens", absl::StrCat("is ", request.min_tokens(),
                                               "; limit is max_tokens, ", request.max_tokens()));
  }
  violations->CheckCount("stop_token_ids", request.stop_token_ids_size(), limits.stop_ids_max);
  CheckIds("stop_token_ids", request.stop_token_ids(), limits.vocab_size, violations);
  if (request.has_logprobs() && request.logprobs() > step::kMaxLogprobs) {
    violations->Add("logprobs", absl::StrCat("is ", request.logprobs(), "; allowed: 0 to ",
                                             step::kMaxLogprobs));
  }
}

}  // namespace

absl::StatusOr<engine::Request> ToEngineRequest(const worker::v1::GenerateRequest& request,
                                                const RequestLimits& limits, Deadline deadline,
                                                const Clock& clock) {
  Violations violations;
  CheckCounts(request, limits, &violations);
  CheckTenant(request, &violations);
  if (!request.has_sampling()) violations.Add("sampling", "is not set");

  engine::Request converted;
  if (request.has_sampling()) {
    converted.sampling = ConvertSampling(request.sampling(), limits, &violations);
  }
  converted.queue_deadline = ConvertQueueTimeout(request, limits, clock.Now(), &violations);
  if (!violations.list().empty()) return InvalidFieldsError(violations.list());

  const int64_t prompt_tokens = request.prompt_token_ids_size();
  if (prompt_tokens + int64_t{request.max_tokens()} > limits.max_context) {
    return ContextError(prompt_tokens, request.max_tokens(), limits.max_context);
  }
  converted.prompt.assign(request.prompt_token_ids().begin(), request.prompt_token_ids().end());
  converted.tenant = request.tenant();
  converted.priority = ConvertPriority(request.priority());
  converted.prefix_salt = request.prefix_salt();
  converted.bypass_prefix_cache = request.bypass_prefix_cache();
  converted.seed = request.seed();
  converted.max_tokens = static_cast<int32_t>(request.max_tokens());
  converted.min_tokens = static_cast<int32_t>(request.min_tokens());
  converted.stop_ids.assign(request.stop_token_ids().begin(), request.stop_token_ids().end());
  if (request.has_logprobs()) converted.logprobs = static_cast<int32_t>(request.logprobs());
  converted.deadline = deadline;
  return converted;
}

}  // namespace nibble::rpc
