// What a model's own files say about generation: sampling defaults and end-of-sequence ids.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble::gateway {

// Every field has a value; starts as nibble's own defaults.
struct SamplingDefaults {
  float temperature = 1;
  float top_p = 1;
  uint32_t top_k = 0;
  float min_p = 0;
  float typical_p = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  float repetition_penalty = 1;
};

enum class SamplingSource { kModel, kNibble };  // --sampling-defaults

struct GenerationDefaults {
  SamplingDefaults sampling;
  std::vector<int32_t> eos_ids;       // ascending, no id twice
  std::vector<std::string> warnings;  // values that were out of range and not taken
};

struct GenerationFiles {
  std::string_view config_json;             // may be empty
  std::string_view generation_config_json;  // may be empty
  std::optional<int32_t> tokenizer_eos;
  int32_t vocab_size = 0;
};

// The union of eos_token_id (a number or a list) in both files and of the tokenizer's; sampling
// from generation_config.json where `source` says so (do_sample is ignored). INVALID_ARGUMENT names
// the file that is no JSON object or holds an eos_token_id that is neither.
[[nodiscard]] absl::StatusOr<GenerationDefaults> ReadGenerationDefaults(
    const GenerationFiles& files, SamplingSource source);

// Drops the second of two beginning-of-sequence ids at the start: the tokenizer adds one, and a
// text may begin with one already.
void DropDoubleBos(std::optional<int32_t> bos_id, std::vector<int32_t>* ids);

}  // namespace nibble::gateway
