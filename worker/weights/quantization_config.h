// What config.json (or an old side file) says of the quantization. A cross-check and a report:
// each layer's layout is decided by the tensors that exist.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json_fwd.hpp"

namespace nibble::weights {

enum class Layout : uint8_t {
  kNone,               // nothing is quantized
  kGemm,               // AutoAWQ gemm (and its exllama and ipex aliases)
  kGemv,               // AutoAWQ gemv, llm-awq v1
  kGemvFast,           // AutoAWQ gemv_fast
  kLlmAwq,             // llm-awq v2: gemv_fast with scaled_zeros
  kMarlin,             // AutoAWQ marlin, symmetric
  kCompressedTensors,  // llm-compressor pack-quantized
};

[[nodiscard]] const char* LayoutName(Layout layout);

struct QuantizationConfig {
  Layout layout = Layout::kNone;
  int32_t bits = 4;
  int32_t group_size = 128;  // -1 = the whole row
  bool zero_point = true;
  std::vector<std::string> modules_to_not_convert;
};

// `side_file`: quant_config.json or quantize_config.json, or null. UNIMPLEMENTED names what is
// refused: 8 bits, GPTQ, act-order. do_fuse, modules_to_fuse and fuse_max_seq_len are not read:
// they tell transformers which of its modules to replace; every matrix that can be fused is fused
// here.
[[nodiscard]] absl::StatusOr<QuantizationConfig> ParseQuantizationConfig(
    const nlohmann::json& config, const nlohmann::json& side_file);

}  // namespace nibble::weights
