#include "worker/execution/cpu/model_shard.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "worker/weights/activation_plan.h"
#include "worker/weights/linear_shapes.h"
#include "worker/weights/rank_weights.h"

namespace nibble::execution {
namespace {

using weights::Checkpoint;
using weights::LogicalLinear;
using weights::TensorView;

}  // namespace

absl::StatusOr<std::unique_ptr<ModelShard>> ModelShard::Load(const Checkpoint& checkpoint,
                                                             const weights::RankShare& share,
                                                             const LoadOptions& options) {
  std::unique_ptr<ModelShard> shard(new ModelShard(checkpoint.spec(), share));
  RETURN_IF_ERROR(shard->LoadEmbedding(checkpoint));
  shard->MakeRope(options.max_context);
  RETURN_IF_ERROR(shard->LoadMatrices(checkpoint, options));
  return shard;
}

// The calling thread and threads - 1 others take the next piece each until none is left: the head,
// which is the largest, then the layers.
absl::Status ModelShard::LoadMatrices(const Checkpoint& checkpoint, const LoadOptions& options) {
  const int32_t pieces = spec_.layer_count + 1;
  std::atomic<int32_t> next{0};
  std::mutex mutex;
  absl::Status first_error;
  const auto work = [&](bool reports) {
    for (int32_t piece = next.fetch_add(1); piece < pieces; piece = next.fetch_add(1)) {
      absl::Status status =
          piece == 0 ? LoadHead(checkpoint, options) : LoadLayer(checkpoint, options, piece - 1);
      if (!status.ok()) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (first_error.ok()) first_error = std::move(status);
        next.store(pieces);
      }
      if (reports && options.progress) options.progress(arena_.bytes(), options.planned_bytes);
    }
  };
  std::vector<std::thread> others;
  for (int32_t thread = 1; thread < std::min(options.threads, pieces); ++thread) {
    others.emplace_back(work, false);
  }
  work(true);
  for (std::thread& other : others) other.join();
  if (options.progress) options.progress(arena_.bytes(), options.planned_bytes);
  return first_error;
}

absl::Status ModelShard::LoadLayer(const Checkpoint& checkpoint, const LoadOptions& options,
                                   int32_t layer) {
  const int32_t terms = weights::ActivationTerms(options.memory);
  LayerShard& shard = layers_[static_cast<size_t>(layer)];
  const auto pack = [&](absl::StatusOr<LogicalLinear> linear, PackedMatrix* matrix) {
    if (linear.ok()) *matrix = PackedMatrix::Pack(*linear, terms, &arena_);
    return linear.status();
  };
  RETURN_IF_ERROR(pack(weights::LoadQkv(checkpoint, share_, layer), &shard.qkv));
  RETURN_IF_ERROR(pack(weights::LoadO(checkpoint, share_, layer), &shard.o));
  RETURN_IF_ERROR(pack(weights::LoadGateUp(checkpoint, share_, layer), &shard.gate_up));
  RETURN_IF_ERROR(pack(weights::LoadDown(checkpoint, share_, layer), &shard.down));
  const float** const places[] = {&shard.attention_norm, &shard.mlp_norm, &shard.q_norm,
                                  &shard.k_norm};
  const std::vector<weights::NormTensor> norms = weights::LayerNorms(spec_, layer);
  CHECK(norms.size() == (spec_.qk_norm ? 4 : 2));
  for (size_t i = 0; i < norms.size(); ++i) {
    ASSIGN_OR_RETURN(*places[i], LoadNorm(checkpoint, norms[i].name, norms[i].size));
  }
  shard.window = spec_.WindowedLayer(layer) ? spec_.sliding_window : 0;
  return absl::OkStatus();
}

absl::StatusOr<const float*> ModelShard::LoadNorm(const Checkpoint& checkpoint,
                                                  std::string_view name, int32_t size) {
  ASSIGN_OR_RETURN(const std::vector<float> values, checkpoint.LoadDense(name, {size}));
  auto* copy = arena_.Allocate<float>(size);
  std::copy(values.begin(), values.end(), copy);
  return copy;
}

absl::Status ModelShard::LoadEmbedding(const Checkpoint& checkpoint) {
  RETURN_IF_ERROR(
      checkpoint.DescribeDense(weights::kEmbeddingName, {spec_.vocab_size, spec_.hidden_size})
          .status());
  const TensorView& whole = *checkpoint.Find(weights::kEmbeddingName);
  const int64_t row_bytes = spec_.hidden_size * weights::TensorTypeBytes(whole.type);
  const auto bytes = static_cast<size_t>(share_.vocab.count() * row_bytes);
  auto* copy = arena_.Allocate<std::byte>(static_cast<int64_t>(bytes));
  std::memcpy(copy, whole.data.data() + share_.vocab.begin * row_bytes, bytes);
  embedding_ = {.type = whole.type,
                .shape = {share_.vocab.count(), spec_.hidden_size},
                .data = {copy, bytes}};
  return absl::OkStatus();
}

absl::Status ModelShard::LoadHead(const Checkpoint& checkpoint, const LoadOptions& options) {
  ASSIGN_OR_RETURN(final_norm_, LoadNorm(checkpoint, weights::kFinalNormName, spec_.hidden_size));
  ASSIGN_OR_RETURN(const weights::PackedFormat format,
                   weights::HeadPackedFormat(checkpoint, share_, options.memory));
  const TensorView* stored =
      checkpoint.Find(spec_.tied_head ? std::string(weights::kEmbeddingName)
                                      : std::string(weights::kHeadName) + ".weight");
  // A dense head is large: it is converted in pieces, never as a whole in fp32.
  if (format.kind != weights::PackedKind::kW4 && !format.bias && stored != nullptr) {
    head_ = PackedMatrix::PackStoredRows(*stored, share_.vocab,
                                         format.kind == weights::PackedKind::kInt8, &arena_);
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const LogicalLinear head, weights::LoadRankHead(checkpoint, share_));
  head_ = PackedMatrix::Pack(head, weights::ActivationTerms(options.memory), &arena_);
  return absl::OkStatus();
}

// Angles as transformers computes them: an fp32 product of position and frequency.
void ModelShard::MakeRope(int32_t max_context) {
  const int32_t half = spec_.head_dim / 2;
  const model::RopeTable table = model::MakeRopeTable(spec_.rope, spec_.head_dim, max_context);
  auto* cos = arena_.Allocate<float>(static_cast<int64_t>(max_context) * half);
  auto* sin = arena_.Allocate<float>(static_cast<int64_t>(max_context) * half);
  rope_ = {.cos = cos, .sin = sin};
  for (int32_t position = 0; position < max_context; ++position) {
    for (int32_t i = 0; i < half; ++i) {
      const float angle =
          static_cast<float>(position) * table.inverse_frequencies[static_cast<size_t>(i)];
      *cos++ = static_cast<float>(std::cos(static_cast<double>(angle))) * table.attention_factor;
      *sin++ = static_cast<float>(std::sin(static_cast<double>(angle))) * table.attention_factor;
    }
  }
}

void ModelShard::Embed(int32_t token_id, float* out) const {
  const int32_t hidden = spec_.hidden_size;
  if (token_id < share_.vocab.begin || token_id >= share_.vocab.end) {
    std::fill_n(out, hidden, 0.0f);
    return;
  }
  WidenElements(embedding_, static_cast<int64_t>(token_id - share_.vocab.begin) * hidden, hidden,
                out);
}

}  // namespace nibble::execution
