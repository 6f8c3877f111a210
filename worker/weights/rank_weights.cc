#include "worker/weights/rank_weights.h"

#include <algorithm>
#include <numeric>

#include "base/check.h"
#include "base/status.h"
#include "kernels/layout/cpu_w4.h"
#include "worker/model/message.h"
#include "worker/weights/float_types.h"
#include "worker/weights/linear_shapes.h"

namespace nibble::weights {
namespace {

using model::Message;

constexpr int32_t kLargestGroup = 128;

// What heads take of a matrix's rows or columns.
Range HeadRows(const model::ModelSpec& spec, const Range& heads) {
  return {heads.begin * spec.head_dim, heads.end * spec.head_dim};
}

// One part of a fused matrix: all columns, `rows` of them.
struct Part {
  LinearInfo info;
  int32_t rows = 0;
};

PackedFormat FuseFormats(const std::vector<Part>& parts) {
  PackedFormat format;
  format.columns = parts.front().info.columns;
  int32_t quantized = 0;
  bool same_type = true;
  format.group = kLargestGroup;
  for (const Part& part : parts) {
    format.rows += part.rows;
    format.bias = format.bias || part.info.has_bias;
    same_type = same_type && part.info.stored_type == parts.front().info.stored_type;
    if (part.info.group_size == 0) continue;
    ++quantized;
    format.group = std::min(format.group, PackedGroup(part.info.group_size, 0, format.columns));
  }
  if (quantized == static_cast<int32_t>(parts.size())) {
    CHECK(format.group > 0);  // stored groups are multiples of 32
    format.kind = PackedKind::kW4;
    const bool half = same_type && parts.front().info.stored_type == FloatType::kF16;
    format.type = half ? FloatType::kF16 : FloatType::kF32;
    return format;
  }
  format.group = 0;
  format.kind = PackedKind::kDense;
  format.type = quantized == 0 && same_type ? parts.front().info.stored_type : FloatType::kF32;
  return format;
}

// The fused matrix in the form that FuseFormats describes.
absl::StatusOr<LogicalLinear> Fuse(std::vector<LogicalLinear> parts) {
  bool all = true;
  bool any = false;
  int32_t group = kLargestGroup;
  for (const LogicalLinear& part : parts) {
    all = all && part.quantized();
    any = any || part.quantized();
    if (part.quantized()) group = std::min(group, PackedGroup(part.group_size, 0, part.columns));
  }
  for (LogicalLinear& part : parts) {
    if (all) {
      CHECK(group > 0);
      part = Regroup(std::move(part), group);
    } else if (any) {
      part.dense = Dequantize(part);
      part.q.clear();
      part.zeros.clear();
      part.scales.clear();
      part.group_size = 0;
      part.stored_type = FloatType::kF32;
    }
  }
  LogicalLinear fused;
  if (parts.size() == 1) {
    fused = std::move(parts.front());
  } else {
    ASSIGN_OR_RETURN(fused, ConcatenateRows(parts));
  }
  if (fused.quantized() && fused.stored_type != FloatType::kF16) {
    fused.stored_type = FloatType::kF32;
  }
  return fused;
}

absl::StatusOr<PackedFormat> DescribeRows(const Checkpoint& checkpoint, int32_t layer,
                                          const std::vector<RoleRange>& rows) {
  std::vector<Part> parts;
  for (const auto& [role, range] : rows) {
    ASSIGN_OR_RETURN(const LinearInfo info, checkpoint.DescribeLinear(LinearName(layer, role)));
    parts.push_back({info, range.count()});
  }
  return FuseFormats(parts);
}

absl::StatusOr<LogicalLinear> LoadRows(const Checkpoint& checkpoint, int32_t layer,
                                       const std::vector<RoleRange>& rows) {
  std::vector<LogicalLinear> parts;
  for (const auto& [role, range] : rows) {
    ASSIGN_OR_RETURN(LogicalLinear part, checkpoint.LoadLinearRows(LinearName(layer, role), range));
    parts.push_back(std::move(part));
  }
  return Fuse(std::move(parts));
}

absl::Status CutsGroup(const std::string& name, int32_t group, const Range& columns) {
  return absl::InvalidArgumentError(
      Message(name, ": the rank's columns ", columns.begin, " … ", columns.end, " cut groups of ",
              group, " where groups of 32 do not fit; use another tensor-parallel degree"));
}

absl::StatusOr<PackedFormat> DescribeColumns(const Checkpoint& checkpoint, int32_t layer,
                                             const RoleRange& held) {
  const auto& [role, columns] = held;
  const std::string name = LinearName(layer, role);
  ASSIGN_OR_RETURN(LinearInfo info, checkpoint.DescribeLinear(name));
  info.columns = columns.count();
  info.has_bias = info.has_bias && columns.begin == 0;
  if (info.group_size == 0) return FuseFormats({{info, info.rows}});
  const int32_t group = PackedGroup(info.group_size, columns.begin, columns.end);
  if (group == 0) return CutsGroup(name, info.group_size, columns);
  info.group_size = group;
  return FuseFormats({{info, info.rows}});
}

absl::StatusOr<LogicalLinear> LoadColumns(const Checkpoint& checkpoint, int32_t layer,
                                          const RoleRange& held) {
  const auto& [role, columns] = held;
  const std::string name = LinearName(layer, role);
  ASSIGN_OR_RETURN(const LinearInfo info, checkpoint.DescribeLinear(name));
  const int32_t group =
      info.group_size > 0 ? PackedGroup(info.group_size, columns.begin, columns.end) : 0;
  if (info.group_size > 0 && group == 0) return CutsGroup(name, info.group_size, columns);
  ASSIGN_OR_RETURN(LogicalLinear part, checkpoint.LoadLinearColumns(name, columns));
  if (group > 0) part = Regroup(std::move(part), group);
  return Fuse({std::move(part)});
}

// The largest unit at which FFN columns can be cut for that many ranks: of the candidates that
// divide ffn_size, the first that shares evenly where `even`, else that gives each rank some.
int32_t FirstUnit(int32_t ffn_size, int32_t rank_count, const std::vector<int32_t>& candidates,
                  bool even) {
  int32_t unit = 0;
  for (const int32_t candidate : candidates) {
    if (ffn_size % candidate != 0) continue;
    const int32_t units = ffn_size / candidate;
    if (even && units % rank_count != 0) continue;
    unit = candidate;
    if (units >= rank_count) break;
  }
  return unit;
}

absl::StatusOr<int32_t> FfnUnit(const Checkpoint& checkpoint, int32_t rank_count) {
  const model::ModelSpec& spec = checkpoint.spec();
  int32_t group = 0;  // common divisor of every quantized down_proj's groups
  for (int32_t layer = 0; layer < spec.layer_count; ++layer) {
    ASSIGN_OR_RETURN(const LinearInfo info,
                     checkpoint.DescribeLinear(LinearName(layer, LinearRole::kDown)));
    group = std::gcd(group, info.group_size);
  }
  if (rank_count < 1) return 1;  // ComputeShares refuses it
  if (group == 0) {              // dense columns may be cut anywhere
    const std::vector<int32_t> candidates = {64, 32, 16, 8, 4, 2, 1};
    const int32_t unit = FirstUnit(spec.ffn_size, rank_count, candidates, /*even=*/true);
    return unit > 0 ? unit : FirstUnit(spec.ffn_size, rank_count, candidates, /*even=*/false);
  }
  std::vector<int32_t> candidates = {group};
  for (const int32_t smaller : {128, 64, 32}) {
    if (smaller < group && group % smaller == 0) candidates.push_back(smaller);
  }
  return FirstUnit(spec.ffn_size, rank_count, candidates, /*even=*/false);
}

}  // namespace

std::vector<RoleRange> QkvRows(const model::ModelSpec& spec, const RankShare& share) {
  const Range kv = HeadRows(spec, share.kv_heads);
  return {
      {LinearRole::kQ, HeadRows(spec, share.heads)}, {LinearRole::kK, kv}, {LinearRole::kV, kv}};
}

RoleRange OColumns(const model::ModelSpec& spec, const RankShare& share) {
  return {LinearRole::kO, HeadRows(spec, share.heads)};
}

std::vector<RoleRange> GateUpRows(const RankShare& share) {
  return {{LinearRole::kGate, share.ffn}, {LinearRole::kUp, share.ffn}};
}

RoleRange DownColumns(const RankShare& share) { return {LinearRole::kDown, share.ffn}; }

int64_t AlignedBytes(int64_t bytes) {
  return (bytes + layout::kAlignment - 1) / layout::kAlignment * layout::kAlignment;
}

int64_t W4Bytes(int32_t rows, int32_t columns, int32_t group, FloatType scale_type) {
  const int64_t entries = layout::GroupEntries(rows, columns, group);
  return AlignedBytes(layout::W4NibbleBytes(rows, columns)) +
         AlignedBytes(entries * FloatTypeBytes(scale_type)) + AlignedBytes(entries);
}

int64_t Int8MatrixBytes(int32_t rows, int32_t columns) {
  return AlignedBytes(layout::Int8Bytes(rows, columns)) +
         AlignedBytes(layout::GroupEntries(rows, columns, layout::kInt8Group) * 4);
}

int64_t DenseBytes(int32_t rows, int32_t columns, FloatType type) {
  return AlignedBytes(layout::DenseEntries(rows, columns) * FloatTypeBytes(type));
}

int64_t PackedBytes(const PackedFormat& format) {
  const int64_t bias = format.bias ? AlignedBytes(int64_t{4} * format.rows) : 0;
  switch (format.kind) {
    case PackedKind::kW4:
      return bias + W4Bytes(format.rows, format.columns, format.group, format.type);
    case PackedKind::kInt8:
      return bias + Int8MatrixBytes(format.rows, format.columns);
    case PackedKind::kDense:
      break;
  }
  return bias + DenseBytes(format.rows, format.columns, format.type);
}

absl::StatusOr<LayerFormats> DescribeLayer(const Checkpoint& checkpoint, const RankShare& share,
                                           int32_t layer) {
  const model::ModelSpec& spec = checkpoint.spec();
  LayerFormats formats;
  ASSIGN_OR_RETURN(formats.qkv, DescribeRows(checkpoint, layer, QkvRows(spec, share)));
  ASSIGN_OR_RETURN(formats.o, DescribeColumns(checkpoint, layer, OColumns(spec, share)));
  ASSIGN_OR_RETURN(formats.gate_up, DescribeRows(checkpoint, layer, GateUpRows(share)));
  ASSIGN_OR_RETURN(formats.down, DescribeColumns(checkpoint, layer, DownColumns(share)));
  return formats;
}

absl::StatusOr<PackedFormat> DescribeRankHead(const Checkpoint& checkpoint,
                                              const RankShare& share) {
  ASSIGN_OR_RETURN(const LinearInfo info, checkpoint.DescribeHead());
  return FuseFormats({{info, share.vocab.count()}});
}

absl::StatusOr<LogicalLinear> LoadQkv(const Checkpoint& checkpoint, const RankShare& share,
                                      int32_t layer) {
  return LoadRows(checkpoint, layer, QkvRows(checkpoint.spec(), share));
}

absl::StatusOr<LogicalLinear> LoadO(const Checkpoint& checkpoint, const RankShare& share,
                                    int32_t layer) {
  return LoadColumns(checkpoint, layer, OColumns(checkpoint.spec(), share));
}

absl::StatusOr<LogicalLinear> LoadGateUp(const Checkpoint& checkpoint, const RankShare& share,
                                         int32_t layer) {
  return LoadRows(checkpoint, layer, GateUpRows(share));
}

absl::StatusOr<LogicalLinear> LoadDown(const Checkpoint& checkpoint, const RankShare& share,
                                       int32_t layer) {
  return LoadColumns(checkpoint, layer, DownColumns(share));
}

absl::StatusOr<LogicalLinear> LoadRankHead(const Checkpoint& checkpoint, const RankShare& share) {
  ASSIGN_OR_RETURN(LogicalLinear whole, checkpoint.LoadHead());
  if (share.vocab.count() == whole.rows) return Fuse({std::move(whole)});
  return Fuse({SliceRows(whole, share.vocab.begin, share.vocab.end)});
}

absl::StatusOr<std::vector<RankShare>> PlanShares(const Checkpoint& checkpoint,
                                                  int32_t rank_count) {
  ASSIGN_OR_RETURN(const int32_t unit, FfnUnit(checkpoint, rank_count));
  return ComputeShares(checkpoint.spec(), rank_count, unit);
}

}  // namespace nibble::weights
