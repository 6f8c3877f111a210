// Admission::CheckFields and its parts.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "services/gateway/admission.h"
#include "services/gateway/sampling_ranges.h"

namespace nibble::gateway {
namespace {

namespace pb = inference::v1;
using Violations = std::vector<FieldViolation>;

void Add(Violations* violations, std::string field, std::string description) {
  violations->push_back({std::move(field), std::move(description)});
}

// Accepts a JSON array of bounded depth without building it.
class ArrayProbe : public nlohmann::json::json_sax_t {
 public:
  explicit ArrayProbe(int depth_max) : depth_max_(depth_max) {}
  bool null() override { return Value(); }
  bool boolean(bool) override { return Value(); }
  bool number_integer(number_integer_t) override { return Value(); }
  bool number_unsigned(number_unsigned_t) override { return Value(); }
  bool number_float(number_float_t, const string_t&) override { return Value(); }
  bool string(string_t&) override { return Value(); }
  bool binary(binary_t&) override { return false; }
  bool key(string_t&) override { return true; }
  bool start_object(std::size_t) override { return Value() && ++depth_ <= depth_max_; }
  bool end_object() override { return --depth_ >= 0; }
  bool start_array(std::size_t) override {
    ++depth_;
    return depth_ <= depth_max_;
  }
  bool end_array() override { return --depth_ >= 0; }
  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception&) override {
    return false;
  }

 private:
  // The outermost value must be an array: nothing else may stand at depth 0.
  [[nodiscard]] bool Value() const { return depth_ > 0; }

  int depth_max_;
  int depth_ = 0;
};

void CheckJsonArray(const std::string& json, const std::string& field, int depth,
                    Violations* violations) {
  ArrayProbe probe(depth);
  if (nlohmann::json::sax_parse(json, &probe)) return;
  Add(violations, field, absl::StrCat("is not a JSON array at most ", depth, " levels deep"));
}

void CheckRange(bool present, float value, const Range& range, const std::string& path,
                Violations* violations) {
  if (!present || range.Holds(value)) return;
  Add(violations, path + range.field, absl::StrCat("is ", value, "; allowed ", range.text));
}

std::string OutsideVocabulary(uint32_t id, uint32_t vocab_size) {
  return absl::StrCat("has id ", id, "; the vocabulary has ", vocab_size, " tokens");
}

void CheckLogitBias(const pb::SamplingParams& sampling, const std::string& path,
                    const Limits& limits, const ServedModel* model, Violations* violations) {
  const std::string field = path + "logit_bias";
  if (sampling.logit_bias_size() > limits.logit_bias) {
    Add(violations, field,
        absl::StrCat("has ", sampling.logit_bias_size(), " entries; limit is ", limits.logit_bias));
    return;  // 300 bad entries would be as many lines
  }
  std::vector<std::pair<uint32_t, float>> entries(sampling.logit_bias().begin(),
                                                  sampling.logit_bias().end());
  std::sort(entries.begin(), entries.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  for (const auto& [id, bias] : entries) {
    if (kLogitBias.Holds(bias)) continue;
    Add(violations, field,
        absl::StrCat("is ", bias, " for id ", id, "; allowed ", kLogitBias.text));
    break;
  }
  if (model != nullptr && !entries.empty() && entries.back().first >= model->info.vocab_size()) {
    Add(violations, field, OutsideVocabulary(entries.back().first, model->info.vocab_size()));
  }
}

void CheckSampling(const pb::SamplingParams& sampling, const std::string& path,
                   const Limits& limits, const ServedModel* model, Violations* violations) {
  CheckRange(sampling.has_temperature(), sampling.temperature(), kTemperature, path, violations);
  CheckRange(sampling.has_top_p(), sampling.top_p(), kTopP, path, violations);
  CheckRange(sampling.has_min_p(), sampling.min_p(), kMinP, path, violations);
  CheckRange(sampling.has_typical_p(), sampling.typical_p(), kTypicalP, path, violations);
  CheckRange(sampling.has_presence_penalty(), sampling.presence_penalty(), kPresencePenalty, path,
             violations);
  CheckRange(sampling.has_frequency_penalty(), sampling.frequency_penalty(), kFrequencyPenalty,
             path, violations);
  CheckRange(sampling.has_repetition_penalty(), sampling.repetition_penalty(), kRepetitionPenalty,
             path, violations);
  constexpr uint32_t kTopKMax = std::numeric_limits<int32_t>::max();
  if (sampling.has_top_k() && sampling.top_k() > kTopKMax) {
    Add(violations, path + "top_k",
        absl::StrCat("is ", sampling.top_k(), "; allowed 0 to ", kTopKMax));
  }
  if (sampling.has_n() && (sampling.n() < 1 || sampling.n() > limits.n)) {
    Add(violations, path + "n", absl::StrCat("is ", sampling.n(), "; allowed 1 to ", limits.n));
  }
  CheckLogitBias(sampling, path, limits, model, violations);
}

void CheckStops(const pb::StoppingCriteria& stopping, const std::string& path, const Limits& limits,
                Violations* violations) {
  if (stopping.stop_size() > limits.stops) {
    Add(violations, path + "stop",
        absl::StrCat("has ", stopping.stop_size(), " entries; limit is ", limits.stops));
    return;
  }
  for (int i = 0; i < stopping.stop_size(); ++i) {
    const size_t bytes = stopping.stop(i).size();
    if (bytes >= 1 && bytes <= limits.stop_bytes) continue;
    Add(violations, absl::StrCat(path, "stop[", i, "]"),
        absl::StrCat("has ", bytes, " bytes; allowed 1 to ", limits.stop_bytes));
  }
}

void CheckStopping(const pb::StoppingCriteria& stopping, const std::string& path,
                   const Limits& limits, const ServedModel* model, Violations* violations) {
  constexpr uint32_t kTokensMax = std::numeric_limits<int32_t>::max();
  if (stopping.has_max_tokens() &&
      (stopping.max_tokens() < 1 || stopping.max_tokens() > kTokensMax)) {
    Add(violations, path + "max_tokens",
        absl::StrCat("is ", stopping.max_tokens(), "; allowed 1 to ", kTokensMax));
  }
  if (stopping.min_tokens() > kTokensMax) {
    Add(violations, path + "min_tokens",
        absl::StrCat("is ", stopping.min_tokens(), "; allowed 0 to ", kTokensMax));
  } else if (stopping.has_max_tokens() && stopping.min_tokens() > stopping.max_tokens()) {
    Add(violations, path + "min_tokens",
        absl::StrCat("is ", stopping.min_tokens(), "; max_tokens is ", stopping.max_tokens()));
  }
  CheckStops(stopping, path, limits, violations);
  const std::string field = path + "stop_token_ids";
  if (stopping.stop_token_ids_size() > limits.stop_token_ids) {
    Add(violations, field,
        absl::StrCat("has ", stopping.stop_token_ids_size(), " entries; limit is ",
                     limits.stop_token_ids));
    return;
  }
  if (model == nullptr) return;
  for (const uint32_t id : stopping.stop_token_ids()) {
    if (id < model->info.vocab_size()) continue;
    Add(violations, field, OutsideVocabulary(id, model->info.vocab_size()));
    return;
  }
}

void CheckRequestId(const std::string& id, const std::string& field, const Limits& limits,
                    Violations* violations) {
  if (id.size() > limits.request_id_bytes) {
    Add(violations, field,
        absl::StrCat("has ", id.size(), " bytes; limit is ", limits.request_id_bytes));
  } else if (!std::all_of(id.begin(), id.end(), [](unsigned char c) {
               return c > 0x20 && c < 0x7F && c != '"' && c != '\\';
             })) {
    // It stands in log lines and headers as it is.
    Add(violations, field, "has a character other than visible ASCII without quotes, backslashes");
  }
}

void CheckQueueTimeout(const google::protobuf::Duration& timeout, const std::string& field,
                       const Limits& limits, Violations* violations) {
  const auto seconds_max = std::chrono::duration_cast<std::chrono::seconds>(limits.queue_timeout);
  const bool valid = timeout.seconds() >= 0 && timeout.nanos() >= 0 &&
                     timeout.nanos() < 1'000'000'000 && timeout.seconds() < seconds_max.count();
  if (valid) return;
  Add(violations, field,
      absl::StrCat("is ", timeout.seconds(), " s and ", timeout.nanos(),
                   " ns; allowed from 0 to below ", seconds_max.count(), " s"));
}

void CheckMessage(const pb::ChatMessage& message, const std::string& field, const Limits& limits,
                  Violations* violations) {
  const std::string& role = message.role();
  if (role != "system" && role != "user" && role != "assistant" && role != "tool") {
    Add(violations, field + ".role", "is none of system, user, assistant, tool");
  }
  if (message.has_tool_calls_json()) {
    CheckJsonArray(message.tool_calls_json(), field + ".tool_calls_json", limits.json_depth,
                   violations);
  }
}

size_t BytesOf(const pb::ChatMessage& message) {
  return message.role().size() + message.content().size() + message.name().size() +
         message.tool_calls_json().size() + message.tool_call_id().size();
}

}  // namespace

void Admission::CheckModelName(const std::string& name, const std::string& field,
                               Violations* violations) const {
  if (name.size() <= limits_.model_bytes) return;
  Add(violations, field,
      absl::StrCat("has ", name.size(), " bytes; limit is ", limits_.model_bytes));
}

void Admission::CheckText(const std::string& text, const std::string& field,
                          Violations* violations) const {
  if (text.size() <= limits_.prompt_bytes) return;
  Add(violations, field,
      absl::StrCat("has ", text.size(), " bytes; limit is ", limits_.prompt_bytes));
}

void Admission::CheckTokenIds(const google::protobuf::RepeatedField<uint32_t>& ids,
                              const std::string& field, const ServedModel* model,
                              Violations* violations) const {
  if (model == nullptr) return;
  const auto bad = std::find_if(ids.begin(), ids.end(),
                                [&](uint32_t id) { return id >= model->info.vocab_size(); });
  if (bad != ids.end()) Add(violations, field, OutsideVocabulary(*bad, model->info.vocab_size()));
}

void Admission::CheckConversation(
    const google::protobuf::RepeatedPtrField<pb::ChatMessage>& messages,
    const std::string* tools_json, const std::string& prefix, Violations* violations) const {
  if (messages.empty()) Add(violations, prefix + "messages", "is empty");
  if (messages.size() > limits_.messages) {
    Add(violations, prefix + "messages",
        absl::StrCat("has ", messages.size(), " entries; limit is ", limits_.messages));
    return;
  }
  size_t bytes = tools_json == nullptr ? 0 : tools_json->size();
  for (const pb::ChatMessage& message : messages) bytes += BytesOf(message);
  if (bytes > limits_.prompt_bytes) {
    Add(violations, prefix + "messages",
        absl::StrCat("has ", bytes, " bytes, tools included; limit is ", limits_.prompt_bytes));
    return;
  }
  constexpr size_t kNamedMax = 16;  // bad messages, beyond which one more says as much
  const size_t before = violations->size();
  for (int i = 0; i < messages.size() && violations->size() - before < kNamedMax; ++i) {
    CheckMessage(messages.Get(i), absl::StrCat(prefix, "messages[", i, "]"), limits_, violations);
  }
  if (tools_json != nullptr) {
    CheckJsonArray(*tools_json, prefix + "tools_json", limits_.json_depth, violations);
  }
}

std::vector<FieldViolation> Admission::CheckFields(const GenerationInput& input,
                                                   const ServedModel* model) const {
  Violations violations;
  const std::string& prefix = input.prefix;
  CheckModelName(*input.model, prefix + "model", &violations);
  CheckRequestId(*input.request_id, prefix + "request_id", limits_, &violations);
  if (input.text != nullptr) {
    if (input.text->empty()) Add(&violations, prefix + "text", "is empty");
    CheckText(*input.text, prefix + "text", &violations);
  } else if (input.token_ids != nullptr) {
    const std::string field = prefix + "token_ids.ids";
    if (input.token_ids->ids().empty()) Add(&violations, field, "is empty");
    CheckTokenIds(input.token_ids->ids(), field, model, &violations);
  } else if (input.messages != nullptr) {
    CheckConversation(*input.messages, input.tools_json, prefix, &violations);
  } else {
    Add(&violations, prefix + "prompt", "is not set; give text or token_ids");
  }
  CheckSampling(*input.sampling, prefix + "sampling.", limits_, model, &violations);
  CheckStopping(*input.stopping, prefix + "stopping.", limits_, model, &violations);
  if (input.output->logprobs() > limits_.logprobs) {
    Add(&violations, prefix + "output.logprobs",
        absl::StrCat("is ", input.output->logprobs(), "; allowed 0 to ", limits_.logprobs));
  }
  if (input.queue_timeout != nullptr) {
    CheckQueueTimeout(*input.queue_timeout, prefix + "queue_timeout", limits_, &violations);
  }
  return violations;
}

}  // namespace nibble::gateway
