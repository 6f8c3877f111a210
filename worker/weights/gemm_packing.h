// The AutoAWQ "gemm" layout, written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "worker/weights/logical_linear.h"
#include "worker/weights/safetensors_writer.h"

namespace nibble::weights {

inline constexpr int32_t kGemmRowUnit = 8;  // rows are packed eight to a word

// NAME.qweight, NAME.qzeros, NAME.scales of a matrix of that shape. REQUIRES: rows % 8 == 0,
// columns % group_size == 0.
[[nodiscard]] std::vector<TensorPlan> PlanGemm(const std::string& name, int32_t rows,
                                               int32_t columns, int32_t group_size);

// The three tensors' data in PlanGemm's order. REQUIRES: every scale is a value of fp16.
[[nodiscard]] std::vector<std::vector<std::byte>> PackGemm(const LogicalLinear& linear);

}  // namespace nibble::weights
