// The logical form that every checkpoint layout maps to.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble::weights {

enum class FloatType : uint8_t { kF16, kBF16, kF32 };

// y = W x + bias, W of [rows = out features, columns = in features].
// Either quantized (q, zeros, scales): w[n,k] = (q[n,k] - zeros[n,k/group]) * scales[n,k/group],
// or dense: `dense` holds the stored values widened to fp32 and `stored_type` what they were.
struct LogicalLinear {
  std::string name;  // "model.layers.0.self_attn.q_proj"
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t group_size = 0;                   // 0 = dense; else divides columns
  std::vector<uint8_t> q;                   // [rows, columns], 0…15
  std::vector<uint8_t> zeros;               // [rows, columns / group_size], 0…15
  std::vector<float> scales;                // [rows, columns / group_size], exact
  FloatType stored_type = FloatType::kF16;  // of scales, or of the dense values
  std::vector<float> dense;                 // [rows, columns]
  std::vector<float> bias;                  // [rows] or empty

  [[nodiscard]] bool quantized() const { return group_size > 0; }
  [[nodiscard]] int32_t group_count() const { return group_size > 0 ? columns / group_size : 0; }
};

// The group in which the kernels hold columns [begin, end) of a matrix with groups of
// `group_size`: the largest of 128, 64, 32 that divides the group, begin and end; 0 where none
// does.
[[nodiscard]] int32_t PackedGroup(int32_t group_size, int32_t begin, int32_t end);

// Rows [begin, end), with their bias.
[[nodiscard]] LogicalLinear SliceRows(const LogicalLinear& linear, int32_t begin, int32_t end);

// Columns [begin, end). A group that is cut has its scale and zero on both sides: the slice is
// regrouped to the largest of 128, 64, 32 that divides begin, end and the group. The bias stays
// only with the slice that begins at 0, so that a sum over slices adds it once.
// INVALID_ARGUMENT where no such group exists.
[[nodiscard]] absl::StatusOr<LogicalLinear> SliceColumns(const LogicalLinear& linear, int32_t begin,
                                                         int32_t end);

// The same values with every group split into groups of `group_size`, which divides the group.
[[nodiscard]] LogicalLinear Regroup(LogicalLinear linear, int32_t group_size);

// Matrices with the same columns and the same group, one behind the other on the rows. Where
// stored types differ the result's is kF32; where only some have a bias the others' is zero.
// INVALID_ARGUMENT names two parts that do not match.
[[nodiscard]] absl::StatusOr<LogicalLinear> ConcatenateRows(
    const std::vector<LogicalLinear>& parts);

// fp32 values [rows, columns].
[[nodiscard]] std::vector<float> Dequantize(const LogicalLinear& linear);

}  // namespace nibble::weights
