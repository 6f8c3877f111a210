#include "services/gateway/generation_defaults.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "services/gateway/sampling_ranges.h"

namespace nibble::gateway {
namespace {

using Json = nlohmann::json;

// An empty text is an empty object: the file is not there.
absl::StatusOr<Json> ParseObject(const char* file, std::string_view text) {
  if (text.empty()) return Json::object();
  Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(file, " is not a JSON object"));
  }
  return json;
}

absl::Status CollectEos(const char* file, const Json& json, int32_t vocab_size,
                        std::set<int32_t>* ids) {
  const auto entry = json.find("eos_token_id");
  if (entry == json.end() || entry->is_null()) return absl::OkStatus();
  const Json list = entry->is_array() ? *entry : Json::array({*entry});
  for (const Json& id : list) {
    const bool in_range = id.is_number_integer() && id.get<int64_t>() >= 0 &&
                          !(id.is_number_unsigned() &&
                            id.get<uint64_t>() > uint64_t{std::numeric_limits<int32_t>::max()});
    if (!in_range) {
      return absl::InvalidArgumentError(
          absl::StrCat(file, ": eos_token_id is neither a token id nor a list of them"));
    }
    // An id past the vocabulary can never be sampled.
    if (id.get<int64_t>() < vocab_size) ids->insert(id.get<int32_t>());
  }
  return absl::OkStatus();
}

void ReadFloat(const Json& json, const Range& range, float* target,
               std::vector<std::string>* warnings) {
  const auto entry = json.find(range.field);
  if (entry == json.end() || entry->is_null()) return;
  const float value = entry->is_number() ? entry->get<float>() : std::nanf("");
  if (range.Holds(value)) {
    *target = value;
    return;
  }
  warnings->push_back(
      absl::StrCat("generation_config.json: ", range.field, " is not taken; allowed ", range.text));
}

void ReadTopK(const Json& json, uint32_t* target, std::vector<std::string>* warnings) {
  const auto entry = json.find("top_k");
  if (entry == json.end() || entry->is_null()) return;
  if (entry->is_number_integer()) {
    const auto value = entry->get<int64_t>();
    if (value >= -1 && value <= std::numeric_limits<int32_t>::max()) {
      *target = value < 0 ? 0 : static_cast<uint32_t>(value);  // -1 is another way to say off
      return;
    }
  }
  warnings->push_back("generation_config.json: top_k is not taken; allowed 0 or more");
}

}  // namespace

absl::StatusOr<GenerationDefaults> ReadGenerationDefaults(const GenerationFiles& files,
                                                          SamplingSource source) {
  ASSIGN_OR_RETURN(const Json config, ParseObject("config.json", files.config_json));
  ASSIGN_OR_RETURN(const Json generation,
                   ParseObject("generation_config.json", files.generation_config_json));
  GenerationDefaults defaults;
  std::set<int32_t> eos;
  RETURN_IF_ERROR(CollectEos("config.json", config, files.vocab_size, &eos));
  RETURN_IF_ERROR(CollectEos("generation_config.json", generation, files.vocab_size, &eos));
  if (files.tokenizer_eos.has_value()) eos.insert(*files.tokenizer_eos);
  defaults.eos_ids.assign(eos.begin(), eos.end());
  if (source == SamplingSource::kNibble) return defaults;

  SamplingDefaults& sampling = defaults.sampling;
  std::vector<std::string>* warnings = &defaults.warnings;
  ReadFloat(generation, kTemperature, &sampling.temperature, warnings);
  ReadFloat(generation, kTopP, &sampling.top_p, warnings);
  ReadFloat(generation, kMinP, &sampling.min_p, warnings);
  ReadFloat(generation, kTypicalP, &sampling.typical_p, warnings);
  ReadFloat(generation, kPresencePenalty, &sampling.presence_penalty, warnings);
  ReadFloat(generation, kFrequencyPenalty, &sampling.frequency_penalty, warnings);
  ReadFloat(generation, kRepetitionPenalty, &sampling.repetition_penalty, warnings);
  ReadTopK(generation, &sampling.top_k, warnings);
  return defaults;
}

void DropDoubleBos(std::optional<int32_t> bos_id, std::vector<int32_t>* ids) {
  if (!bos_id.has_value() || ids->size() < 2) return;
  if ((*ids)[0] == *bos_id && (*ids)[1] == *bos_id) ids->erase(ids->begin());
}

}  // namespace nibble::gateway
