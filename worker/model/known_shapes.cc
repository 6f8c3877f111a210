#include "worker/model/known_shapes.h"

#include <array>

namespace nibble::model {
namespace {

struct Row {
  const char* name;
  int32_t hidden, ffn, layers, heads, kv_heads, head_dim, vocab, context, group;
  float theta;
};

constexpr std::array<Row, 5> kRows = {
    {{"mistral-7b", 4096, 14336, 32, 32, 8, 128, 32000, 32768, 128, 1e6F},
     {"llama-3-8b", 4096, 14336, 32, 32, 8, 128, 128256, 8192, 128, 5e5F},
     {"llama-3-70b", 8192, 28672, 80, 64, 8, 128, 128256, 8192, 128, 5e5F},
     {"qwen2.5-32b", 5120, 27648, 64, 40, 8, 128, 152064, 32768, 128, 1e6F},
     {"smollm2", 576, 1536, 30, 9, 3, 64, 49152, 8192, 64, 1e5F}}};

}  // namespace

std::optional<KnownShape> FindKnownShape(std::string_view name) {
  for (const Row& row : kRows) {
    if (name != row.name) continue;
    KnownShape shape;
    shape.group = row.group;
    shape.spec.family = "llama";
    shape.spec.architecture = row.name;
    shape.spec.hidden_size = row.hidden;
    shape.spec.ffn_size = row.ffn;
    shape.spec.layer_count = row.layers;
    shape.spec.head_count = row.heads;
    shape.spec.kv_head_count = row.kv_heads;
    shape.spec.head_dim = row.head_dim;
    shape.spec.vocab_size = row.vocab;
    shape.spec.max_context = row.context;
    shape.spec.context_limit = row.context;
    shape.spec.rope.theta = row.theta;
    return shape;
  }
  return std::nullopt;
}

std::vector<std::string> KnownShapeNames() {
  std::vector<std::string> names;
  for (const Row& row : kRows) names.emplace_back(row.name);
  return names;
}

}  // namespace nibble::model
