#include "worker/execution/cuda/host_matrix.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"
#include "worker/weights/float_types.h"
#include "worker/weights/linear_shapes.h"
#include "worker/weights/rank_weights.h"

namespace nibble::execution {
namespace {

constexpr float kHalfMax = 65504;
constexpr float kBfloat16Max = 3.3895314e38f;
constexpr unsigned kAheadMax = 48;

// The bias in the order of the packed rows: gate and up in tiles of eight and eight.
std::vector<float> PackedBias(const std::vector<float>& bias, bool pair_rows) {
  if (!pair_rows) return bias;
  const size_t half_rows = bias.size() / 2;
  std::vector<float> packed(bias.size());
  for (size_t i = 0; i < half_rows; ++i) {
    packed[i / 8 * 16 + i % 8] = bias[i];
    packed[i / 8 * 16 + 8 + i % 8] = bias[half_rows + i];
  }
  return packed;
}

absl::StatusOr<HostMatrix> Prepare(absl::StatusOr<weights::LogicalLinear> loaded,
                                   cuda::Element element, bool pair_rows) {
  RETURN_IF_ERROR(loaded.status());
  weights::LogicalLinear& linear = *loaded;
  HostMatrix matrix{.rows = linear.rows, .columns = linear.columns, .group = linear.group_size};
  if (linear.quantized()) {
    matrix.q = std::move(linear.q);
    matrix.zeros = std::move(linear.zeros);
    ASSIGN_OR_RETURN(matrix.scales, Narrow(linear.scales, cuda::Element::kHalf, linear.name));
  } else {
    matrix.group = 0;
    ASSIGN_OR_RETURN(matrix.dense, Narrow(linear.dense, element, linear.name));
  }
  if (!linear.bias.empty()) {
    ASSIGN_OR_RETURN(matrix.bias, Narrow(PackedBias(linear.bias, pair_rows), element, linear.name));
  }
  return matrix;
}

absl::StatusOr<HostMatrix> LoadEmbedding(const weights::Checkpoint& checkpoint,
                                         cuda::Element element) {
  const model::ModelSpec& spec = checkpoint.spec();
  ASSIGN_OR_RETURN(
      const std::vector<float> values,
      checkpoint.LoadDense(weights::kEmbeddingName, {spec.vocab_size, spec.hidden_size}));
  HostMatrix matrix{.rows = spec.vocab_size, .columns = spec.hidden_size};
  ASSIGN_OR_RETURN(matrix.dense, Narrow(values, element, weights::kEmbeddingName));
  return matrix;
}

}  // namespace

absl::StatusOr<std::vector<uint16_t>> Narrow(std::span<const float> values, cuda::Element element,
                                             std::string_view name) {
  const bool half = element == cuda::Element::kHalf;
  const float max = half ? kHalfMax : kBfloat16Max;
  std::vector<uint16_t> reals(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::abs(values[i]) > max) {
      return absl::InvalidArgumentError(absl::StrCat(std::string(name), " holds ", values[i], "; ",
                                                     half ? "fp16" : "bf16", " ends at ", max));
    }
    reals[i] = half ? weights::FloatToHalf(values[i]) : weights::FloatToBFloat(values[i]);
  }
  return reals;
}

MatrixQueue::MatrixQueue(const weights::Checkpoint& checkpoint, const weights::RankShare& share,
                         cuda::Element element, bool stored)
    // Half of the matrices are small: they wait, ready, while others are read.
    : ahead_max_(std::clamp(2 * std::thread::hardware_concurrency(), 2U, kAheadMax)) {
  const weights::Checkpoint* file = &checkpoint;
  const weights::RankShare* part = &share;
  const auto find = [=](int32_t layer, FusedMatrix which) {
    return stored ? FindStored(*file, *part, layer, which) : std::nullopt;
  };
  for (int32_t layer = 0; layer < checkpoint.spec().layer_count; ++layer) {
    Add(find(layer, FusedMatrix::kQkv),
        [=] { return Prepare(weights::LoadQkv(*file, *part, layer), element, false); });
    Add(find(layer, FusedMatrix::kO),
        [=] { return Prepare(weights::LoadO(*file, *part, layer), element, false); });
    Add(find(layer, FusedMatrix::kGateUp),
        [=] { return Prepare(weights::LoadGateUp(*file, *part, layer), element, true); });
    Add(find(layer, FusedMatrix::kDown),
        [=] { return Prepare(weights::LoadDown(*file, *part, layer), element, false); });
  }
  Add(stored ? FindStoredHead(checkpoint, share, element) : std::nullopt,
      [=] { return Prepare(weights::LoadRankHead(*file, *part), element, false); });
  Add(stored ? FindStoredEmbedding(checkpoint, element) : std::nullopt,
      [=] { return LoadEmbedding(*file, element); });
  StartMore();
}

// Waits for what was started: futures of std::async do.
MatrixQueue::~MatrixQueue() = default;

void MatrixQueue::Add(std::optional<StoredMatrix> stored, Task task) {
  if (!stored.has_value()) tasks_.push_back(std::move(task));
  stored_.push_back(std::move(stored));
}

std::vector<StoredBlock> MatrixQueue::StoredBlocks() const {
  std::vector<StoredBlock> blocks;
  for (const auto& matrix : stored_) {
    if (!matrix.has_value()) continue;
    for (const StoredPart& part : matrix->parts) {
      blocks.push_back(part.values);
      if (matrix->group == 0) continue;
      blocks.push_back(part.zeros);
      blocks.push_back(part.scales);
    }
  }
  return blocks;
}

void MatrixQueue::StartMore() {
  while (started_ < tasks_.size() && running_.size() < ahead_max_) {
    // Where no thread is to be had, Next() does the work.
    running_.push_back(std::async(std::launch::async | std::launch::deferred, tasks_[started_]));
    ++started_;
  }
}

absl::StatusOr<HostMatrix> MatrixQueue::Next() {
  CHECK(given_ < stored_.size());
  const std::optional<StoredMatrix>& stored = stored_[given_++];
  if (stored.has_value()) {
    return HostMatrix{
        .rows = stored->rows, .columns = stored->columns, .group = stored->group, .stored = stored};
  }
  CHECK(!running_.empty());
  absl::StatusOr<HostMatrix> matrix = running_.front().get();
  running_.pop_front();
  StartMore();
  return matrix;
}

}  // namespace nibble::execution
