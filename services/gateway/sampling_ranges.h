// The allowed range of every sampling field: one table for requests and for models' own defaults.
#pragma once

namespace nibble::gateway {

struct Range {
  const char* field;
  float min;
  float max;
  bool min_open;     // min itself is not allowed
  const char* text;  // for messages

  // NaN and infinities are in no range.
  [[nodiscard]] constexpr bool Holds(float value) const {
    return value <= max && (min_open ? value > min : value >= min);
  }
};

inline constexpr Range kTemperature = {"temperature", 0, 100, false, "[0, 100]"};
inline constexpr Range kTopP = {"top_p", 0, 1, true, "(0, 1]"};
inline constexpr Range kMinP = {"min_p", 0, 1, false, "[0, 1]"};
inline constexpr Range kTypicalP = {"typical_p", 0, 1, true, "(0, 1]"};
inline constexpr Range kPresencePenalty = {"presence_penalty", -2, 2, false, "[-2, 2]"};
inline constexpr Range kFrequencyPenalty = {"frequency_penalty", -2, 2, false, "[-2, 2]"};
inline constexpr Range kRepetitionPenalty = {"repetition_penalty", 0.01F, 10, false, "[0.01, 10]"};
inline constexpr Range kLogitBias = {"logit_bias", -100, 100, false, "[-100, 100]"};

}  // namespace nibble::gateway
