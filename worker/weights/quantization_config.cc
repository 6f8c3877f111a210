#include "worker/weights/quantization_config.h"

#include <array>
#include <utility>

#include "absl/strings/ascii.h"
#include "base/status.h"
#include "nlohmann/json.hpp"
#include "worker/model/config_reader.h"
#include "worker/model/message.h"

namespace nibble::weights {
namespace {

using model::BadValue;
using model::ConfigReader;
using model::Message;
using nlohmann::json;

constexpr std::string_view kVersions = "gemm, exllama, ipex, gemv, gemv_fast, llm-awq, marlin";

absl::Status Refused(const ConfigReader& reader, std::string_view key, const json& value,
                     std::string_view allowed) {
  return absl::UnimplementedError(BadValue(reader.where(), key, value, allowed).message());
}

// The first of two spellings that is there.
std::string_view Spelling(const ConfigReader& reader, std::string_view key,
                          std::string_view other) {
  return !reader.Has(key) && reader.Has(other) ? other : key;
}

absl::StatusOr<std::string> LowerString(const ConfigReader& reader, std::string_view key,
                                        std::string_view fallback) {
  ASSIGN_OR_RETURN(std::string text, reader.String(key, fallback));
  absl::AsciiStrToLower(&text);
  return text;
}

absl::Status CheckBits(const ConfigReader& reader, std::string_view key) {
  ASSIGN_OR_RETURN(const int32_t bits, reader.Int(key, {1, 64}, 4));
  if (bits == 4) return absl::OkStatus();
  return Refused(reader, key, bits, "4");
}

absl::StatusOr<std::vector<std::string>> Names(const ConfigReader& reader, std::string_view key) {
  const json* value = reader.Find(key);
  std::vector<std::string> names;
  if (value == nullptr) return names;
  if (!value->is_array()) return BadValue(reader.where(), key, *value, "an array of names, null");
  for (const json& name : *value) {
    if (!name.is_string()) return BadValue(reader.where(), key, name, "an array of names, null");
    names.push_back(name.get<std::string>());
  }
  return names;
}

absl::StatusOr<Layout> AwqLayout(const ConfigReader& reader) {
  ASSIGN_OR_RETURN(const std::string backend, LowerString(reader, "backend", "autoawq"));
  if (backend == "llm-awq") return Layout::kLlmAwq;
  const std::string_view key = reader.Has("version")  ? "version"
                               : reader.Has("format") ? "format"
                                                      : "checkpoint_format";
  ASSIGN_OR_RETURN(const std::string version, LowerString(reader, key, "gemm"));
  constexpr std::array<std::pair<std::string_view, Layout>, 7> kLayouts = {{
      {"gemm", Layout::kGemm},
      {"exllama", Layout::kGemm},
      {"ipex", Layout::kGemm},
      {"gemv", Layout::kGemv},
      {"gemv_fast", Layout::kGemvFast},
      {"llm-awq", Layout::kLlmAwq},
      {"marlin", Layout::kMarlin},
  }};
  for (const auto& [name, layout] : kLayouts) {
    if (name == version) return layout;
  }
  return Refused(reader, key, version, kVersions);
}

absl::StatusOr<QuantizationConfig> ParseAwq(const ConfigReader& reader) {
  QuantizationConfig quantization;
  RETURN_IF_ERROR(CheckBits(reader, Spelling(reader, "bits", "w_bit")));
  ASSIGN_OR_RETURN(quantization.layout, AwqLayout(reader));
  const std::string_view group_key = Spelling(reader, "group_size", "q_group_size");
  ASSIGN_OR_RETURN(quantization.group_size, reader.Int(group_key, {-1, 1 << 20}, 128));
  if (quantization.group_size == 0) {
    return BadValue(reader.where(), group_key, 0, "-1 (the whole row), 1 … 1048576");
  }
  ASSIGN_OR_RETURN(const bool symmetric, reader.Bool("sym", false));
  ASSIGN_OR_RETURN(quantization.zero_point, reader.Bool("zero_point", !symmetric));
  ASSIGN_OR_RETURN(quantization.modules_to_not_convert, Names(reader, "modules_to_not_convert"));
  return quantization;
}

// One scheme of config_groups.
struct Scheme {
  int32_t group_size = 128;
  bool symmetric = false;
};

absl::Status CheckActorder(const ConfigReader& weights) {
  const json* value = weights.Find("actorder");
  // "static" and "weight" only chose the order of quantization; the columns are stored in place.
  if (value == nullptr || *value == false || *value == "static" || *value == "weight") {
    return absl::OkStatus();
  }
  return Refused(weights, "actorder", *value, "null, static (act-order is not supported)");
}

absl::StatusOr<Scheme> ParseScheme(const ConfigReader& scheme) {
  for (const std::string_view key : {"input_activations", "output_activations"}) {
    if (scheme.Has(key)) return Refused(scheme, key, *scheme.Find(key), "null");
  }
  ASSIGN_OR_RETURN(const std::string format, LowerString(scheme, "format", "pack-quantized"));
  if (format != "pack-quantized") return Refused(scheme, "format", format, "pack-quantized");
  const json* object = scheme.Find("weights");
  if (object == nullptr || !object->is_object()) return scheme.Missing("weights", "an object");
  const ConfigReader weights(*object, Message(scheme.where(), ": weights"));
  RETURN_IF_ERROR(CheckBits(weights, "num_bits"));
  RETURN_IF_ERROR(CheckActorder(weights));
  ASSIGN_OR_RETURN(const std::string type, LowerString(weights, "type", "int"));
  if (type != "int") return Refused(weights, "type", type, "int");
  ASSIGN_OR_RETURN(const bool dynamic, weights.Bool("dynamic", false));
  if (dynamic) return Refused(weights, "dynamic", true, "false");
  Scheme result;
  ASSIGN_OR_RETURN(result.symmetric, weights.Bool("symmetric", true));
  ASSIGN_OR_RETURN(const std::string strategy, LowerString(weights, "strategy", "group"));
  if (strategy == "channel") {
    result.group_size = -1;
    return result;
  }
  if (strategy != "group") return Refused(weights, "strategy", strategy, "group, channel");
  ASSIGN_OR_RETURN(result.group_size, weights.Int("group_size", {1, 1 << 20}));
  return result;
}

// Something that would change the arithmetic at run time and is not read.
absl::Status CheckEmpty(const ConfigReader& reader, std::string_view key) {
  const json* value = reader.Find(key);
  if (value == nullptr || (value->is_object() && value->empty())) return absl::OkStatus();
  const auto format = value->find("format");
  if (format != value->end() && *format == "dense") return absl::OkStatus();
  return Refused(reader, key, *value, "null, {}");
}

absl::StatusOr<QuantizationConfig> ParseCompressedTensors(const ConfigReader& reader) {
  RETURN_IF_ERROR(CheckEmpty(reader, "sparsity_config"));
  RETURN_IF_ERROR(CheckEmpty(reader, "transform_config"));
  const json* groups = reader.Find("config_groups");
  if (groups == nullptr || !groups->is_object() || groups->empty()) {
    return reader.Missing("config_groups", "an object with at least one scheme");
  }
  QuantizationConfig quantization;
  quantization.layout = Layout::kCompressedTensors;
  bool first = true;
  for (const auto& [name, value] : groups->items()) {
    const std::string where = Message(reader.where(), ": config_groups: ", name);
    if (!value.is_object()) return BadValue(where, "scheme", value, "an object");
    ASSIGN_OR_RETURN(const Scheme scheme, ParseScheme(ConfigReader(value, where)));
    const bool same = first || quantization.group_size == scheme.group_size;
    quantization.group_size = same ? scheme.group_size : 0;
    quantization.zero_point = (first ? false : quantization.zero_point) || !scheme.symmetric;
    first = false;
  }
  // An overall format may be "mixed-precision"; each scheme's own was checked.
  ASSIGN_OR_RETURN(const std::string format, LowerString(reader, "format", "pack-quantized"));
  if (format != "pack-quantized" && format != "mixed-precision") {
    return Refused(reader, "format", format, "pack-quantized");
  }
  ASSIGN_OR_RETURN(quantization.modules_to_not_convert, Names(reader, "ignore"));
  return quantization;
}

// AutoGPTQ's quantize_config.json does not name its method.
bool LooksLikeGptq(const ConfigReader& reader) {
  return reader.Has("damp_percent") || (reader.Has("desc_act") && !reader.Has("version") &&
                                        !reader.Has("zero_point") && !reader.Has("w_bit"));
}

}  // namespace

const char* LayoutName(Layout layout) {
  switch (layout) {
    case Layout::kNone:
      return "none";
    case Layout::kGemm:
      return "gemm";
    case Layout::kGemv:
      return "gemv";
    case Layout::kGemvFast:
      return "gemv_fast";
    case Layout::kLlmAwq:
      return "llm-awq";
    case Layout::kMarlin:
      return "marlin";
    case Layout::kCompressedTensors:
      return "compressed-tensors";
  }
  return "unknown";
}

absl::StatusOr<QuantizationConfig> ParseQuantizationConfig(const json& config,
                                                           const json& side_file) {
  const json* object = nullptr;
  std::string where;
  const std::pair<const json*, std::pair<std::string_view, std::string_view>> places[] = {
      {&config, {"config.json", "quantization_config"}},
      {&config, {"config.json", "compression_config"}},
  };
  for (const auto& [document, place] : places) {
    if (object != nullptr || !document->is_object()) continue;
    const auto found = document->find(place.second);
    if (found == document->end() || found->is_null()) continue;
    object = &*found;
    where = Message(place.first, ": ", place.second);
  }
  if (object == nullptr && !side_file.is_null()) {
    object = &side_file;
    where = "quantization side file";
  }
  if (object == nullptr) return QuantizationConfig{};
  if (!object->is_object()) {
    return absl::InvalidArgumentError(
        Message(where, " is ", model::DescribeValue(*object), "; allowed: an object"));
  }
  const ConfigReader reader(*object, where);
  const bool gptq = !reader.Has("quant_method") && LooksLikeGptq(reader);
  ASSIGN_OR_RETURN(const std::string method,
                   LowerString(reader, "quant_method", gptq ? "gptq" : "awq"));
  if (method == "awq") return ParseAwq(reader);
  if (method == "compressed-tensors") return ParseCompressedTensors(reader);
  return Refused(reader, "quant_method", method, "awq, compressed-tensors");
}

}  // namespace nibble::weights
