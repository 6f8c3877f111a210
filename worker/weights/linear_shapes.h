// What a ModelSpec expects of each linear layer, and the names that the decoder reads.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "worker/model/model_spec.h"

namespace nibble::weights {

inline constexpr std::string_view kEmbeddingName = "model.embed_tokens.weight";
inline constexpr std::string_view kFinalNormName = "model.norm.weight";
inline constexpr std::string_view kHeadName = "lm_head";

struct LinearShape {
  int32_t rows = 0;
  int32_t columns = 0;
  bool bias = false;
};

enum class LinearRole : uint8_t { kQ, kK, kV, kO, kGate, kUp, kDown };
inline constexpr LinearRole kLinearRoles[] = {LinearRole::kQ,   LinearRole::kK,    LinearRole::kV,
                                              LinearRole::kO,   LinearRole::kGate, LinearRole::kUp,
                                              LinearRole::kDown};

// "model.layers.3.self_attn.q_proj".
[[nodiscard]] std::string LinearName(int32_t layer, LinearRole role);
[[nodiscard]] LinearShape ShapeOf(const model::ModelSpec& spec, LinearRole role);

// nullopt for a name that is no layer of the decoder.
[[nodiscard]] std::optional<LinearShape> ExpectedShape(const model::ModelSpec& spec,
                                                       std::string_view name);

// A norm's weight: "model.layers.3." + "input_layernorm" … + ".weight".
struct NormTensor {
  std::string name;
  int32_t size = 0;
};
// Of one layer: input_layernorm, post_attention_layernorm, then q_norm and k_norm where the spec
// has them.
[[nodiscard]] std::vector<NormTensor> LayerNorms(const model::ModelSpec& spec, int32_t layer);

}  // namespace nibble::weights
