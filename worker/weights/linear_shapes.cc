#include "worker/weights/linear_shapes.h"

#include "worker/model/message.h"

namespace nibble::weights {
namespace {

using model::Message;

std::string_view RoleName(LinearRole role) {
  constexpr std::string_view kNames[] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                         "self_attn.o_proj", "mlp.gate_proj",    "mlp.up_proj",
                                         "mlp.down_proj"};
  return kNames[static_cast<size_t>(role)];
}

}  // namespace

std::string LinearName(int32_t layer, LinearRole role) {
  return Message("model.layers.", layer, ".", RoleName(role));
}

LinearShape ShapeOf(const model::ModelSpec& spec, LinearRole role) {
  const int32_t query_rows = spec.head_count * spec.head_dim;
  const int32_t kv_rows = spec.kv_head_count * spec.head_dim;
  switch (role) {
    case LinearRole::kQ:
      return {query_rows, spec.hidden_size, spec.qkv_bias};
    case LinearRole::kK:
    case LinearRole::kV:
      return {kv_rows, spec.hidden_size, spec.qkv_bias};
    case LinearRole::kO:
      return {spec.hidden_size, query_rows, spec.o_bias};
    case LinearRole::kGate:
    case LinearRole::kUp:
      return {spec.ffn_size, spec.hidden_size, spec.mlp_bias};
    case LinearRole::kDown:
      return {spec.hidden_size, spec.ffn_size, spec.mlp_bias};
  }
  return {};
}

std::optional<LinearShape> ExpectedShape(const model::ModelSpec& spec, std::string_view name) {
  if (name == kHeadName) return LinearShape{spec.vocab_size, spec.hidden_size, false};
  if (!name.starts_with("model.layers.")) return std::nullopt;
  for (const LinearRole role : kLinearRoles) {
    if (name.ends_with(RoleName(role))) return ShapeOf(spec, role);
  }
  return std::nullopt;
}

std::vector<NormTensor> LayerNorms(const model::ModelSpec& spec, int32_t layer) {
  const std::string prefix = Message("model.layers.", layer, ".");
  std::vector<NormTensor> norms = {{prefix + "input_layernorm.weight", spec.hidden_size},
                                   {prefix + "post_attention_layernorm.weight", spec.hidden_size}};
  if (spec.qk_norm) {
    norms.push_back({prefix + "self_attn.q_norm.weight", spec.head_dim});
    norms.push_back({prefix + "self_attn.k_norm.weight", spec.head_dim});
  }
  return norms;
}

}  // namespace nibble::weights
