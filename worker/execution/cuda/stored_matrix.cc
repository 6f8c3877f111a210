#include "worker/execution/cuda/stored_matrix.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "worker/weights/linear_shapes.h"
#include "worker/weights/rank_weights.h"

namespace nibble::execution {
namespace {

using weights::LinearRole;
using weights::Range;
using weights::TensorView;

// Columns [begin, end) of a matrix of `columns` elements of `bytes` each, lines [first, last).
StoredBlock BlockOf(const TensorView& view, Range lines, Range columns, int64_t bytes) {
  const int64_t stride = view.shape[1] * bytes;
  return {.from = view.data.data() + lines.begin * stride + columns.begin * bytes,
          .lines = lines.count(),
          .line_bytes = columns.count() * bytes,
          .stride = stride};
}

std::optional<StoredPart> FindGemm(const weights::Checkpoint& checkpoint, const std::string& name,
                                   const weights::LinearInfo& info, Range rows, Range columns) {
  const TensorView* qweight = checkpoint.Find(absl::StrCat(name, ".qweight"));
  const TensorView* qzeros = checkpoint.Find(absl::StrCat(name, ".qzeros"));
  const TensorView* scales = checkpoint.Find(absl::StrCat(name, ".scales"));
  if (qweight == nullptr || qzeros == nullptr || scales == nullptr) return std::nullopt;
  const Range words = {rows.begin / 8, rows.end / 8};
  const Range groups = {columns.begin / info.group_size, columns.end / info.group_size};
  return StoredPart{.name = absl::StrCat(name, ".scales"),
                    .rows = rows.count(),
                    .values = BlockOf(*qweight, columns, words, 4),
                    .zeros = BlockOf(*qzeros, groups, words, 4),
                    .scales = BlockOf(*scales, groups, rows, 2)};
}

struct PartRange {
  LinearRole role;
  Range rows, columns;
};

std::vector<PartRange> WholeColumns(const model::ModelSpec& spec,
                                    const std::vector<weights::RoleRange>& rows) {
  std::vector<PartRange> parts;
  for (const auto& [role, range] : rows) {
    parts.push_back({role, range, {0, weights::ShapeOf(spec, role).columns}});
  }
  return parts;
}

std::vector<PartRange> WholeRows(const model::ModelSpec& spec, const weights::RoleRange& columns) {
  return {{columns.first, {0, weights::ShapeOf(spec, columns.first).rows}, columns.second}};
}

std::vector<PartRange> PartsOf(const model::ModelSpec& spec, const weights::RankShare& share,
                               FusedMatrix which) {
  switch (which) {
    case FusedMatrix::kQkv:
      return WholeColumns(spec, weights::QkvRows(spec, share));
    case FusedMatrix::kO:
      return WholeRows(spec, weights::OColumns(spec, share));
    case FusedMatrix::kGateUp:
      return WholeColumns(spec, weights::GateUpRows(share));
    case FusedMatrix::kDown:
      return WholeRows(spec, weights::DownColumns(share));
  }
  return {};
}

bool PackedAsStored(int32_t group) { return group == 32 || group == 64 || group == 128; }

// Rows [begin, end) of a dense matrix.
std::optional<StoredMatrix> FindDense(const weights::Checkpoint& checkpoint,
                                      const std::string& name, Range rows, int32_t all_rows,
                                      int32_t columns, cuda::Element element) {
  const auto type =
      element == cuda::Element::kHalf ? weights::TensorType::kF16 : weights::TensorType::kBF16;
  const TensorView* view = checkpoint.Find(name);
  if (view == nullptr || view->type != type || rows.count() == 0 ||
      view->shape != std::vector<int64_t>{all_rows, columns}) {
    return std::nullopt;
  }
  StoredMatrix matrix{.rows = rows.count(), .columns = columns};
  matrix.parts.push_back(
      {.name = name, .rows = rows.count(), .values = BlockOf(*view, rows, {0, columns}, 2)});
  return matrix;
}

}  // namespace

void CopyLines(const StoredBlock& block, int64_t first, int64_t count, std::byte* to) {
  const std::byte* from = block.from + first * block.stride;
  if (block.stride == block.line_bytes) {
    std::memcpy(to, from, static_cast<size_t>(count * block.line_bytes));
    return;
  }
  for (int64_t line = 0; line < count; ++line) {
    std::memcpy(to + line * block.line_bytes, from + line * block.stride,
                static_cast<size_t>(block.line_bytes));
  }
}

std::optional<StoredMatrix> FindStored(const weights::Checkpoint& checkpoint,
                                       const weights::RankShare& share, int32_t layer,
                                       FusedMatrix which) {
  StoredMatrix matrix;
  for (const PartRange& range : PartsOf(checkpoint.spec(), share, which)) {
    const std::string name = weights::LinearName(layer, range.role);
    const auto info = checkpoint.DescribeLinear(name);
    if (!info.ok() || info->layout != weights::Layout::kGemm ||
        info->stored_type != weights::FloatType::kF16 || !PackedAsStored(info->group_size) ||
        checkpoint.Find(absl::StrCat(name, ".bias")) != nullptr) {
      return std::nullopt;
    }
    if (range.rows.count() == 0 || range.columns.count() == 0) return std::nullopt;
    const bool whole = range.rows.begin % 8 == 0 && range.rows.count() % 8 == 0 &&
                       range.columns.begin % info->group_size == 0 &&
                       range.columns.count() % info->group_size == 0;
    const bool alike = matrix.parts.empty() || matrix.group == info->group_size;
    if (!whole || !alike) return std::nullopt;
    auto part = FindGemm(checkpoint, name, *info, range.rows, range.columns);
    if (!part.has_value()) return std::nullopt;
    matrix.group = info->group_size;
    matrix.columns = range.columns.count();
    matrix.rows += part->rows;
    matrix.parts.push_back(*std::move(part));
  }
  return matrix;
}

std::optional<StoredMatrix> FindStoredHead(const weights::Checkpoint& checkpoint,
                                           const weights::RankShare& share, cuda::Element element) {
  const model::ModelSpec& spec = checkpoint.spec();
  const auto info = checkpoint.DescribeHead();
  if (!info.ok() || info->group_size != 0 || info->has_bias) return std::nullopt;
  const std::string name(spec.tied_head ? weights::kEmbeddingName
                                        : absl::StrCat(std::string(weights::kHeadName), ".weight"));
  return FindDense(checkpoint, name, share.vocab, spec.vocab_size, spec.hidden_size, element);
}

std::optional<StoredMatrix> FindStoredEmbedding(const weights::Checkpoint& checkpoint,
                                                cuda::Element element) {
  const model::ModelSpec& spec = checkpoint.spec();
  return FindDense(checkpoint, std::string(weights::kEmbeddingName), {0, spec.vocab_size},
                   spec.vocab_size, spec.hidden_size, element);
}

}  // namespace nibble::execution
