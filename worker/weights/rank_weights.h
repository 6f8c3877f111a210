// A rank's share of every matrix, as the kernels hold it: described from headers alone, and loaded.
// Both sides follow the same law, so a plan made from headers is what a loader allocates.
//
// Fused matrices: q, k, v rows one behind the other; gate rows, then up rows. A fused matrix is
//   W4     where all parts are quantized; its group is the smallest of the parts' packed groups
//          (PackedGroup), its scales kF16 where every part's are stored so, else kF32;
//   dense  where none is; of the parts' type, or kF32 where they differ;
//   dense kF32 where some are: the quantized parts are dequantized.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/linear_shapes.h"
#include "worker/weights/logical_linear.h"
#include "worker/weights/shard.h"

namespace nibble::weights {

// A rank's rows or columns of one linear layer.
using RoleRange = std::pair<LinearRole, Range>;
[[nodiscard]] std::vector<RoleRange> QkvRows(const model::ModelSpec& spec, const RankShare& share);
[[nodiscard]] RoleRange OColumns(const model::ModelSpec& spec, const RankShare& share);
[[nodiscard]] std::vector<RoleRange> GateUpRows(const RankShare& share);
[[nodiscard]] RoleRange DownColumns(const RankShare& share);

enum class PackedKind : uint8_t { kW4, kInt8, kDense };

// One packed matrix (kernels/layout/cpu_w4.h) and its bias (fp32 [rows]).
struct PackedFormat {
  PackedKind kind = PackedKind::kDense;
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t group = 0;                 // kW4: 32, 64 or 128; kInt8: layout::kInt8Group
  FloatType type = FloatType::kF16;  // kW4: of scales, kF16 or kF32; kDense: of values
  bool bias = false;
};

// Every allocation is rounded up to layout::kAlignment.
[[nodiscard]] int64_t AlignedBytes(int64_t bytes);
// Sums of AlignedBytes over the arrays of one matrix, each a separate allocation:
//   W4     nibbles, scales (2 or 4 bytes), zeros (1 byte)
//   int8   values (1 byte), scales (4 bytes)
//   dense  values (2 or 4 bytes)
[[nodiscard]] int64_t W4Bytes(int32_t rows, int32_t columns, int32_t group, FloatType scale_type);
[[nodiscard]] int64_t Int8MatrixBytes(int32_t rows, int32_t columns);
[[nodiscard]] int64_t DenseBytes(int32_t rows, int32_t columns, FloatType type);
// One of the three, and the bias where there is one.
[[nodiscard]] int64_t PackedBytes(const PackedFormat& format);

// The four matrices of a decoder layer.
struct LayerFormats {
  PackedFormat qkv;      // [(heads + 2 * kv_heads) * head_dim, hidden]
  PackedFormat o;        // [hidden, heads * head_dim]
  PackedFormat gate_up;  // [2 * ffn, hidden]
  PackedFormat down;     // [hidden, ffn]
};
// INVALID_ARGUMENT names a tensor that is missing or does not fit, or groups that the share cuts
// where no smaller group fits.
[[nodiscard]] absl::StatusOr<LayerFormats> DescribeLayer(const Checkpoint& checkpoint,
                                                         const RankShare& share, int32_t layer);
// The head's rows of the vocabulary share: W4, or dense as stored (kInt8 is a choice of the
// executor: see HeadPackedFormat in memory_plan.h).
[[nodiscard]] absl::StatusOr<PackedFormat> DescribeRankHead(const Checkpoint& checkpoint,
                                                            const RankShare& share);

// The same matrices' values: group_size is PackedFormat::group, a dense one is stored_type's.
// q, zeros and scales or dense are filled; o's and down's bias is with the rank that holds column
// 0.
[[nodiscard]] absl::StatusOr<LogicalLinear> LoadQkv(const Checkpoint& checkpoint,
                                                    const RankShare& share, int32_t layer);
[[nodiscard]] absl::StatusOr<LogicalLinear> LoadO(const Checkpoint& checkpoint,
                                                  const RankShare& share, int32_t layer);
[[nodiscard]] absl::StatusOr<LogicalLinear> LoadGateUp(const Checkpoint& checkpoint,
                                                       const RankShare& share, int32_t layer);
[[nodiscard]] absl::StatusOr<LogicalLinear> LoadDown(const Checkpoint& checkpoint,
                                                     const RankShare& share, int32_t layer);
[[nodiscard]] absl::StatusOr<LogicalLinear> LoadRankHead(const Checkpoint& checkpoint,
                                                         const RankShare& share);

// ComputeShares with the FFN cut at the groups of every down_proj, at smaller groups only where
// there are fewer groups than ranks; dense ones are cut evenly where that is possible.
[[nodiscard]] absl::StatusOr<std::vector<RankShare>> PlanShares(const Checkpoint& checkpoint,
                                                                int32_t rank_count);

}  // namespace nibble::weights
