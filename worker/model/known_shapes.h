// Shapes of well-known models, to measure without a checkpoint.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "worker/model/model_spec.h"

namespace nibble::model {

struct KnownShape {
  ModelSpec spec;
  int32_t group = 128;  // of its AWQ checkpoints
};

// "mistral-7b", "llama-3-8b", "llama-3-70b", "qwen2.5-32b", "smollm2"; without biases.
[[nodiscard]] std::optional<KnownShape> FindKnownShape(std::string_view name);
[[nodiscard]] std::vector<std::string> KnownShapeNames();

}  // namespace nibble::model
