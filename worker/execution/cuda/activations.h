// The number type in which a GPU keeps activations, KV cache, norms, embedding and dense weights.
// Sums are fp32 with either.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/element.h"
#include "worker/model/model_spec.h"

namespace nibble::execution {

// As an operator names it.
enum class Activations : uint8_t {
  kAuto,  // as the model was trained: bf16 where its config.json says bfloat16, else fp16
  kHalf,
  kBfloat16,
};

[[nodiscard]] inline cuda::Element ElementOf(Activations asked, const model::ModelSpec& spec) {
  const bool trained_in_bf16 = spec.stored_type == "bfloat16";
  const bool bf16 = asked == Activations::kAuto ? trained_in_bf16 : asked == Activations::kBfloat16;
  return bf16 ? cuda::Element::kBfloat16 : cuda::Element::kHalf;
}

[[nodiscard]] constexpr const char* ElementWord(cuda::Element element) {
  return element == cuda::Element::kHalf ? "fp16" : "bf16";
}
[[nodiscard]] constexpr const char* ActivationsWord(Activations activations) {
  if (activations == Activations::kAuto) return "auto";
  return activations == Activations::kHalf ? "fp16" : "bf16";
}
// What an operator may say, as ConfigParser::Choice takes it.
[[nodiscard]] inline std::vector<std::pair<std::string, Activations>> ActivationsChoices() {
  std::vector<std::pair<std::string, Activations>> choices;
  for (const auto each : {Activations::kAuto, Activations::kHalf, Activations::kBfloat16}) {
    choices.emplace_back(ActivationsWord(each), each);
  }
  return choices;
}

}  // namespace nibble::execution
