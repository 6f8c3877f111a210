#include "worker/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "base/check.h"
#include "base/status.h"
#include "worker/model/message.h"

namespace nibble::model {
namespace {

constexpr ConfigReader::FloatRange kTheta{2, 1e12};
constexpr ConfigReader::FloatRange kFactor{1, 1e4};
constexpr ConfigReader::FloatRange kPositive{1e-6, 1e6};
constexpr ConfigReader::IntRange kPositions{1, 1 << 24};
constexpr double kTwoPi = 2 * std::numbers::pi;

absl::Status CheckFullRotation(const ConfigReader& reader) {
  const nlohmann::json* value = reader.Find("partial_rotary_factor");
  if (value == nullptr || (value->is_number() && value->get<double>() == 1.0)) {
    return absl::OkStatus();
  }
  return BadValue(reader.where(), "partial_rotary_factor", *value, "1");
}

absl::Status ParseLlama3(const ConfigReader& reader, RopeSpec* rope) {
  ASSIGN_OR_RETURN(rope->low_frequency_factor, reader.Float("low_freq_factor", kPositive));
  ASSIGN_OR_RETURN(rope->high_frequency_factor, reader.Float("high_freq_factor", kPositive));
  if (rope->high_frequency_factor <= rope->low_frequency_factor) {
    return BadValue(reader.where(), "high_freq_factor", *reader.Find("high_freq_factor"),
                    Message("more than low_freq_factor, ", rope->low_frequency_factor));
  }
  return absl::OkStatus();
}

float YarnMscale(float factor, float mscale) {
  return factor <= 1 ? 1.0f : 0.1f * mscale * std::log(factor) + 1.0f;
}

absl::Status ParseYarn(const ConfigReader& reader, RopeSpec* rope) {
  ASSIGN_OR_RETURN(rope->beta_fast, reader.Float("beta_fast", kPositive, 32.0f));
  ASSIGN_OR_RETURN(rope->beta_slow, reader.Float("beta_slow", kPositive, 1.0f));
  ASSIGN_OR_RETURN(rope->truncate, reader.Bool("truncate", true));
  ASSIGN_OR_RETURN(rope->attention_factor, reader.Float("attention_factor", kPositive, 0.0f));
  ASSIGN_OR_RETURN(const float mscale, reader.Float("mscale", {0, 1e3}, 0.0f));
  ASSIGN_OR_RETURN(const float mscale_all, reader.Float("mscale_all_dim", {0, 1e3}, 0.0f));
  if (rope->attention_factor == 0 && mscale > 0 && mscale_all > 0) {
    rope->attention_factor =
        YarnMscale(rope->factor, mscale) / YarnMscale(rope->factor, mscale_all);
  }
  return absl::OkStatus();
}

absl::Status ParseScaling(const ConfigReader& reader, int32_t max_position, RopeSpec* rope) {
  RETURN_IF_ERROR(CheckFullRotation(reader));
  const char* type_key = reader.Has("rope_type") ? "rope_type" : "type";
  ASSIGN_OR_RETURN(const std::string type, reader.String(type_key, "default"));
  if (type == "default") return absl::OkStatus();
  if (type == "linear") {
    rope->scaling = RopeScaling::kLinear;
  } else if (type == "dynamic") {
    rope->scaling = RopeScaling::kDynamic;
  } else if (type == "llama3") {
    rope->scaling = RopeScaling::kLlama3;
  } else if (type == "yarn") {
    rope->scaling = RopeScaling::kYarn;
  } else {
    return BadValue(reader.where(), type_key, type, "default, linear, dynamic, llama3, yarn");
  }
  ASSIGN_OR_RETURN(rope->original_max_position,
                   reader.Int("original_max_position_embeddings", kPositions, max_position));
  // Dynamic scaling is defined from max_position_embeddings on.
  if (rope->scaling == RopeScaling::kDynamic) rope->original_max_position = max_position;
  std::optional<float> factor;
  if (rope->scaling == RopeScaling::kYarn && max_position >= rope->original_max_position) {
    factor = static_cast<float>(max_position) / static_cast<float>(rope->original_max_position);
  }
  ASSIGN_OR_RETURN(rope->factor, reader.Float("factor", kFactor, factor));
  if (rope->scaling == RopeScaling::kLlama3) return ParseLlama3(reader, rope);
  if (rope->scaling == RopeScaling::kYarn) return ParseYarn(reader, rope);
  return absl::OkStatus();
}

// 1 / theta^(2i / head_dim), rounded where transformers' fp32 arithmetic rounds.
std::vector<float> PlainFrequencies(double theta, int32_t head_dim) {
  std::vector<float> frequencies(head_dim / 2);
  for (int32_t i = 0; i < head_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    const auto power = static_cast<float>(std::pow(theta, static_cast<double>(exponent)));
    frequencies[i] = 1.0f / power;
  }
  return frequencies;
}

void ScaleLlama3(const RopeSpec& rope, std::vector<float>* frequencies) {
  const double length = rope.original_max_position;
  const double low_wavelength = length / rope.low_frequency_factor;
  const double high_wavelength = length / rope.high_frequency_factor;
  for (float& frequency : *frequencies) {
    const double wavelength = kTwoPi / frequency;
    if (wavelength < high_wavelength) continue;
    if (wavelength > low_wavelength) {
      frequency /= rope.factor;
      continue;
    }
    const double smooth = (length / wavelength - rope.low_frequency_factor) /
                          (rope.high_frequency_factor - rope.low_frequency_factor);
    frequency = static_cast<float>((1 - smooth) * frequency / rope.factor + smooth * frequency);
  }
}

// The (fractional) index of the frequency that turns `rotations` times within the original length.
double YarnDimension(const RopeSpec& rope, double rotations, int32_t head_dim) {
  return head_dim * std::log(rope.original_max_position / (rotations * kTwoPi)) /
         (2 * std::log(static_cast<double>(rope.theta)));
}

void ScaleYarn(const RopeSpec& rope, int32_t head_dim, std::vector<float>* frequencies) {
  double low = YarnDimension(rope, rope.beta_fast, head_dim);
  double high = YarnDimension(rope, rope.beta_slow, head_dim);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) high += 0.001;  // as transformers does; the ramp is then a step
  for (size_t i = 0; i < frequencies->size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    const double plain = (*frequencies)[i];
    (*frequencies)[i] = static_cast<float>(plain / rope.factor * ramp + plain * (1 - ramp));
  }
}

}  // namespace

absl::StatusOr<RopeSpec> ParseRope(const ConfigReader& config, int32_t max_position) {
  RopeSpec rope;
  ASSIGN_OR_RETURN(rope.theta, config.Float("rope_theta", kTheta, rope.theta));
  RETURN_IF_ERROR(CheckFullRotation(config));
  const nlohmann::json* scaling = config.Find("rope_scaling");
  const nlohmann::json* parameters = config.Find("rope_parameters");
  for (const auto& [key, value] :
       {std::pair("rope_scaling", scaling), std::pair("rope_parameters", parameters)}) {
    if (value != nullptr && !value->is_object()) {
      return BadValue(config.where(), key, *value, "an object, null");
    }
  }
  if (scaling != nullptr && parameters != nullptr && *scaling != *parameters) {
    return absl::InvalidArgumentError(
        Message(config.where(), ": rope_scaling and rope_parameters differ; allowed: one of them"));
  }
  const char* key = parameters != nullptr ? "rope_parameters" : "rope_scaling";
  const nlohmann::json* object = parameters != nullptr ? parameters : scaling;
  if (object == nullptr) return rope;
  const ConfigReader reader(*object, Message(config.where(), ": ", key));
  ASSIGN_OR_RETURN(rope.theta, reader.Float("rope_theta", kTheta, rope.theta));
  RETURN_IF_ERROR(ParseScaling(reader, max_position, &rope));
  return rope;
}

RopeTable MakeRopeTable(const RopeSpec& rope, int32_t head_dim, int32_t max_position) {
  CHECK(head_dim >= 2 && head_dim % 2 == 0);
  double theta = rope.theta;
  if (rope.scaling == RopeScaling::kDynamic && max_position > rope.original_max_position) {
    CHECK(head_dim > 2);
    const double stretch =
        rope.factor * static_cast<double>(max_position) / rope.original_max_position -
        (rope.factor - 1);
    theta *= std::pow(stretch, static_cast<double>(head_dim) / (head_dim - 2));
  }
  RopeTable table{.inverse_frequencies = PlainFrequencies(theta, head_dim)};
  switch (rope.scaling) {
    case RopeScaling::kNone:
    case RopeScaling::kDynamic:
      break;
    case RopeScaling::kLinear:
      for (float& frequency : table.inverse_frequencies) frequency /= rope.factor;
      break;
    case RopeScaling::kLlama3:
      ScaleLlama3(rope, &table.inverse_frequencies);
      break;
    case RopeScaling::kYarn:
      ScaleYarn(rope, head_dim, &table.inverse_frequencies);
      table.attention_factor =
          rope.attention_factor > 0 ? rope.attention_factor : YarnMscale(rope.factor, 1.0f);
      break;
  }
  return table;
}

}  // namespace nibble::model
