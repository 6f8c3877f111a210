#include "worker/model/model_spec.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/status.h"
#include "worker/model/config_reader.h"
#include "worker/model/message.h"
#include "worker/model/rope.h"

namespace nibble::model {
namespace {

constexpr std::string_view kWhere = "config.json";

// How a family uses `sliding_window`.
enum class Window : uint8_t {
  kNever,  // the key is ignored
  kEveryLayer,
  kSwitched,  // only with use_sliding_window, from layer max_window_layers on
};

// What a family leaves unsaid in config.json.
struct Family {
  std::string_view name;
  std::string_view architecture;
  bool qkv_bias;            // always there, whatever attention_bias says
  bool attention_bias_key;  // attention_bias gives q, k, v and o a bias
  bool mlp_bias_key;
  bool qk_norm;
  int32_t head_dim;  // 0 = hidden_size / heads
  int32_t kv_heads;  // 0 = as many as heads
  int32_t max_position;
  Window window;
};

constexpr std::array<Family, 4> kFamilies = {{
    {"llama", "LlamaForCausalLM", false, true, true, false, 0, 0, 2048, Window::kNever},
    {"mistral", "MistralForCausalLM", false, false, false, false, 0, 8, 131072,
     Window::kEveryLayer},
    {"qwen2", "Qwen2ForCausalLM", true, false, false, false, 0, 32, 32768, Window::kSwitched},
    {"qwen3", "Qwen3ForCausalLM", false, true, false, true, 128, 32, 32768, Window::kSwitched},
}};

constexpr int64_t kMaxHidden = 1 << 17;
constexpr int64_t kMaxFfn = 1 << 20;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxHeads = 1024;
constexpr int64_t kMaxHeadDim = 1024;
constexpr int64_t kMaxVocab = 1 << 22;
constexpr int64_t kMaxPositions = 1 << 24;

std::string KnownArchitectures() {
  std::string names;
  for (const Family& family : kFamilies) {
    names += Message(names.empty() ? "" : ", ", family.architecture);
  }
  return names;
}

absl::StatusOr<const Family*> FindFamily(const ConfigReader& reader, std::string* architecture) {
  const nlohmann::json* value = reader.Find("architectures");
  if (value == nullptr) return reader.Missing("architectures", KnownArchitectures());
  if (!value->is_array() || value->empty() || !value->front().is_string()) {
    return BadValue(kWhere, "architectures", *value, "an array of names");
  }
  *architecture = value->front().get<std::string>();
  for (const Family& family : kFamilies) {
    if (family.architecture == *architecture) return &family;
  }
  return absl::UnimplementedError(Message(kWhere, ": architectures[0] is ",
                                          DescribeValue(value->front()),
                                          "; allowed: ", KnownArchitectures()));
}

absl::Status ParseSizes(const ConfigReader& reader, const Family& family, ModelSpec* spec) {
  ASSIGN_OR_RETURN(spec->hidden_size, reader.Int("hidden_size", {1, kMaxHidden}));
  ASSIGN_OR_RETURN(spec->ffn_size, reader.Int("intermediate_size", {1, kMaxFfn}));
  ASSIGN_OR_RETURN(spec->layer_count, reader.Int("num_hidden_layers", {1, kMaxLayers}));
  ASSIGN_OR_RETURN(spec->head_count, reader.Int("num_attention_heads", {1, kMaxHeads}));
  ASSIGN_OR_RETURN(spec->vocab_size, reader.Int("vocab_size", {1, kMaxVocab}));
  // An explicit null means one KV head per query head; a missing key the family's default.
  const bool kv_null = reader.HasNull("num_key_value_heads");
  const int32_t kv_default = family.kv_heads == 0 || kv_null ? spec->head_count : family.kv_heads;
  ASSIGN_OR_RETURN(spec->kv_head_count,
                   reader.Int("num_key_value_heads", {1, spec->head_count}, kv_default));
  if (spec->kv_head_count > spec->head_count || spec->head_count % spec->kv_head_count != 0) {
    return BadValue(kWhere, "num_key_value_heads", spec->kv_head_count,
                    Message("a divisor of num_attention_heads, ", spec->head_count));
  }
  int32_t head_dim = family.head_dim;
  if (head_dim == 0) {
    if (!reader.Has("head_dim") && spec->hidden_size % spec->head_count != 0) {
      return BadValue(kWhere, "hidden_size", spec->hidden_size,
                      Message("a multiple of num_attention_heads, ", spec->head_count,
                              ", where head_dim is missing"));
    }
    head_dim = spec->hidden_size / spec->head_count;
  }
  ASSIGN_OR_RETURN(spec->head_dim, reader.Int("head_dim", {2, kMaxHeadDim}, head_dim));
  if (spec->head_dim < 2 || spec->head_dim > kMaxHeadDim || spec->head_dim % 2 != 0) {
    return BadValue(kWhere, "head_dim", spec->head_dim,
                    Message("an even number 2 … ", kMaxHeadDim));
  }
  ASSIGN_OR_RETURN(spec->max_context,
                   reader.Int("max_position_embeddings", {1, kMaxPositions}, family.max_position));
  return absl::OkStatus();
}

absl::Status ParseFlags(const ConfigReader& reader, const Family& family, ModelSpec* spec) {
  ASSIGN_OR_RETURN(spec->norm_epsilon, reader.Float("rms_norm_eps", {0, 0.1}, 1e-6f));
  ASSIGN_OR_RETURN(const std::string activation, reader.String("hidden_act", "silu"));
  if (activation != "silu" && activation != "swish") {
    return BadValue(kWhere, "hidden_act", activation, "silu, swish");
  }
  ASSIGN_OR_RETURN(spec->tied_head, reader.Bool("tie_word_embeddings", false));
  ASSIGN_OR_RETURN(const bool attention_bias, reader.Bool("attention_bias", false));
  ASSIGN_OR_RETURN(const bool mlp_bias, reader.Bool("mlp_bias", false));
  spec->qkv_bias = family.qkv_bias || (family.attention_bias_key && attention_bias);
  spec->o_bias = family.attention_bias_key && attention_bias;
  spec->mlp_bias = family.mlp_bias_key && mlp_bias;
  spec->qk_norm = family.qk_norm;
  for (const char* key : {"torch_dtype", "dtype"}) {
    const nlohmann::json* type = reader.Find(key);
    if (type != nullptr && type->is_string()) spec->stored_type = type->get<std::string>();
  }
  return absl::OkStatus();
}

// `layer_types` names each layer's attention; it stands above max_window_layers.
absl::StatusOr<std::vector<bool>> ParseLayerTypes(const nlohmann::json& types,
                                                  int32_t layer_count) {
  if (!types.is_array() || types.size() != static_cast<size_t>(layer_count)) {
    return BadValue(kWhere, "layer_types", types,
                    Message("an array of num_hidden_layers, ", layer_count));
  }
  std::vector<bool> windowed;
  for (const nlohmann::json& type : types) {
    if (type != "sliding_attention" && type != "full_attention") {
      return BadValue(kWhere, Message("layer_types[", windowed.size(), "]"), type,
                      "sliding_attention, full_attention");
    }
    windowed.push_back(type == "sliding_attention");
  }
  return windowed;
}

absl::Status ParseWindow(const ConfigReader& reader, const Family& family, ModelSpec* spec) {
  if (family.window == Window::kNever) return absl::OkStatus();
  ASSIGN_OR_RETURN(const bool used, reader.Bool("use_sliding_window", false));
  if (family.window == Window::kSwitched && !used) return absl::OkStatus();
  // A missing key is the family's 4096; null says that there is no window.
  if (reader.HasNull("sliding_window")) return absl::OkStatus();
  ASSIGN_OR_RETURN(spec->sliding_window, reader.Int("sliding_window", {1, kMaxPositions}, 4096));
  if (family.window == Window::kEveryLayer) return absl::OkStatus();
  if (const nlohmann::json* types = reader.Find("layer_types"); types != nullptr) {
    ASSIGN_OR_RETURN(spec->windowed_layers, ParseLayerTypes(*types, spec->layer_count));
  } else {
    ASSIGN_OR_RETURN(const int32_t first, reader.Int("max_window_layers", {0, 1 << 20}, 28));
    for (int32_t layer = 0; layer < spec->layer_count; ++layer) {
      spec->windowed_layers.push_back(layer >= first);
    }
  }
  if (std::none_of(spec->windowed_layers.begin(), spec->windowed_layers.end(),
                   [](bool windowed) { return windowed; })) {
    spec->sliding_window = 0;
    spec->windowed_layers.clear();
  }
  return absl::OkStatus();
}

// How far the scaled positions reach. A dynamic model is served unscaled unless more is asked for.
void ApplyRopeToContext(ModelSpec* spec) {
  const RopeSpec& rope = spec->rope;
  const double stretched = std::floor(static_cast<double>(rope.original_max_position) *
                                      static_cast<double>(rope.factor));
  const auto reach = static_cast<int32_t>(std::min(stretched, static_cast<double>(kMaxPositions)));
  spec->context_limit = spec->max_context;
  switch (rope.scaling) {
    case RopeScaling::kNone:
    case RopeScaling::kLlama3:
      break;
    case RopeScaling::kDynamic:
      spec->context_limit = std::max(spec->max_context, reach);
      break;
    case RopeScaling::kLinear:
    case RopeScaling::kYarn:
      spec->max_context = std::max(spec->max_context, reach);
      spec->context_limit = spec->max_context;
      break;
  }
}

}  // namespace

absl::StatusOr<ModelSpec> ParseModelSpec(const nlohmann::json& config) {
  if (!config.is_object()) {
    return absl::InvalidArgumentError(Message(kWhere, " is not a JSON object"));
  }
  const ConfigReader reader(config, kWhere);
  ModelSpec spec;
  ASSIGN_OR_RETURN(const Family* family, FindFamily(reader, &spec.architecture));
  spec.family = std::string(family->name);
  RETURN_IF_ERROR(ParseSizes(reader, *family, &spec));
  RETURN_IF_ERROR(ParseFlags(reader, *family, &spec));
  RETURN_IF_ERROR(ParseWindow(reader, *family, &spec));
  ASSIGN_OR_RETURN(spec.rope, ParseRope(reader, spec.max_context));
  if (spec.rope.scaling == RopeScaling::kDynamic && spec.head_dim < 4) {
    return BadValue(kWhere, "head_dim", spec.head_dim, "4 or more with dynamic rope_scaling");
  }
  ApplyRopeToContext(&spec);
  return spec;
}

}  // namespace nibble::model
