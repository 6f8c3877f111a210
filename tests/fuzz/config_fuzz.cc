// Bytes as config.json: an accepted config gives sizes that the rest of nibble can take as they
// are.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "worker/model/model_spec.h"
#include "worker/weights/quantization_config.h"
#include "worker/weights/shard.h"
#include "worker/weights/strict_json.h"

namespace nibble::weights {
namespace {

void CheckSpec(const model::ModelSpec& spec) {
  CHECK(spec.hidden_size > 0 && spec.ffn_size > 0 && spec.layer_count > 0);
  CHECK(spec.vocab_size > 0 && spec.max_context > 0 && spec.context_limit >= spec.max_context);
  CHECK(spec.head_dim > 0 && spec.head_dim % 2 == 0);
  CHECK(spec.kv_head_count > 0 && spec.head_count % spec.kv_head_count == 0);
  CHECK(spec.norm_epsilon >= 0 && std::isfinite(spec.norm_epsilon));
  CHECK(spec.windowed_layers.empty() ||
        spec.windowed_layers.size() == static_cast<size_t>(spec.layer_count));
  const model::RopeTable rope = MakeRopeTable(spec.rope, spec.head_dim, spec.context_limit);
  CHECK(rope.inverse_frequencies.size() == static_cast<size_t>(spec.head_dim) / 2);
  for (const float frequency : rope.inverse_frequencies) {
    CHECK(std::isfinite(frequency));
  }
  CHECK(std::isfinite(rope.attention_factor));
  for (const int32_t ranks : {1, 2, 3, spec.head_count}) {
    const auto shares = ComputeShares(spec, ranks, 1);
    if (!shares.ok()) continue;
    CHECK(shares->back().heads.end == spec.head_count);
    CHECK(shares->back().ffn.end == spec.ffn_size);
    CHECK(shares->back().vocab.end == spec.vocab_size);
  }
}

void Try(std::string_view text) {
  const auto config = ParseStrictJson(text, "config.json");
  if (!config.ok()) {
    CHECK(!config.status().message().empty());
    return;
  }
  const auto spec = model::ParseModelSpec(*config);
  if (spec.ok()) CheckSpec(*spec);
  const auto quantization = ParseQuantizationConfig(*config, *config);
  CHECK(!quantization.ok() || quantization->bits == 4);
}

}  // namespace
}  // namespace nibble::weights

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  nibble::weights::Try({reinterpret_cast<const char*>(data), size});
  return 0;
}
