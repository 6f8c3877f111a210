// An architecture as data: one decoder reads it, a model family is a table row.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json_fwd.hpp"

namespace nibble::model {

enum class RopeScaling { kNone, kLinear, kDynamic, kLlama3, kYarn };

// Rotary embedding in the "rotate half" order of Hugging Face checkpoints.
// Formulas: transformers, modeling_rope_utils; yarn: arXiv 2309.00071.
struct RopeSpec {
  float theta = 10000;
  RopeScaling scaling = RopeScaling::kNone;
  float factor = 1;
  int32_t original_max_position = 0;
  float low_frequency_factor = 1;   // llama3
  float high_frequency_factor = 4;  // llama3
  float beta_fast = 32;             // yarn
  float beta_slow = 1;              // yarn
  float attention_factor = 0;       // yarn; 0 = 0.1 ln(factor) + 1
  bool truncate = true;             // yarn: the ramp's bounds are whole numbers
};

// A decoder of RMSNorm, attention with rotary positions, RMSNorm, SwiGLU.
struct ModelSpec {
  std::string family;        // "llama", "mistral", "qwen2", "qwen3": the row's name
  std::string architecture;  // config.json's architectures[0]
  int32_t hidden_size = 0;
  int32_t ffn_size = 0;
  int32_t layer_count = 0;
  int32_t head_count = 0;
  int32_t kv_head_count = 0;
  int32_t head_dim = 0;
  int32_t vocab_size = 0;
  int32_t max_context = 0;    // positions of one sequence, unless an operator says otherwise
  int32_t context_limit = 0;  // what an operator may raise it to; more than max_context only
                              // for dynamic rope, whose frequencies then change
  float norm_epsilon = 1e-5f;
  RopeSpec rope;
  int32_t sliding_window = 0;         // 0 = none; else positions p-window+1 … p are seen
  std::vector<bool> windowed_layers;  // per layer; empty = all (when sliding_window > 0)
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;  // RMSNorm over head_dim on q and k before rotation (Qwen3)
  bool tied_head = false;
  std::string stored_type;  // config.json's dtype (torch_dtype before it), or empty: "bfloat16"

  [[nodiscard]] bool WindowedLayer(int32_t layer) const {
    return sliding_window > 0 && (windowed_layers.empty() || windowed_layers[layer]);
  }
};

// Reads config.json. INVALID_ARGUMENT names the key, its value and what is allowed;
// UNIMPLEMENTED an architecture that no row describes.
[[nodiscard]] absl::StatusOr<ModelSpec> ParseModelSpec(const nlohmann::json& config);

// Inverse frequencies [head_dim / 2] and the factor on cos and sin, for sequences of up to
// max_position positions (only `dynamic` depends on it).
struct RopeTable {
  std::vector<float> inverse_frequencies;
  float attention_factor = 1;
};
[[nodiscard]] RopeTable MakeRopeTable(const RopeSpec& rope, int32_t head_dim, int32_t max_position);

}  // namespace nibble::model
