// The number type of a step: what activations, the KV cache, norm weights, embedding and dense
// weights are. Kernels that depend on it are compiled once for each (element.cuh).
#pragma once

#include <cstdint>

namespace nibble::cuda {

enum class Element : uint8_t {
  kHalf,      // fp16: eleven significant bits, ends at 65504
  kBfloat16,  // bf16: eight significant bits, the range of fp32
};

// A number of the step's element type, as its bits.
struct Real16 {
  uint16_t bits;
};

}  // namespace nibble::cuda
