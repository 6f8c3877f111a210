#include "worker/weights/memory_plan.h"

#include <algorithm>
#include <limits>

#include "base/status.h"
#include "base/units.h"
#include "kernels/layout/cpu_w4.h"
#include "worker/model/message.h"
#include "worker/weights/activation_plan.h"
#include "worker/weights/float_types.h"
#include "worker/weights/linear_shapes.h"

namespace nibble::weights {
namespace {

using model::Message;

constexpr int32_t kMaxSlots = 1 << 16;
constexpr int32_t kMaxStepTokens = 1 << 20;
constexpr int32_t kMaxThreads = 1024;

absl::Status CheckRange(std::string_view name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(Message(name, " is ", value, "; allowed: ", low, " … ", high));
}

int64_t NormBytes(int32_t size) { return AlignedBytes(int64_t{4} * size); }

absl::Status CheckNorm(const Checkpoint& checkpoint, std::string_view name, int32_t size) {
  return checkpoint.DescribeDense(name, {size}).status();
}

absl::StatusOr<RankMemoryPlan> PlanRank(const Checkpoint& checkpoint, const RankShare& share,
                                        const MemoryOptions& options, int32_t max_context,
                                        int32_t vocab_share_max) {
  const model::ModelSpec& spec = checkpoint.spec();
  RankMemoryPlan plan;
  plan.share = share;
  ASSIGN_OR_RETURN(plan.embedding_bytes, EmbeddingBytes(checkpoint, share));
  for (int32_t layer = 0; layer < spec.layer_count; ++layer) {
    ASSIGN_OR_RETURN(const int64_t bytes, LayerBytes(checkpoint, share, layer));
    plan.layer_bytes += bytes;
  }
  ASSIGN_OR_RETURN(const PackedFormat head, HeadPackedFormat(checkpoint, share, options));
  RETURN_IF_ERROR(CheckNorm(checkpoint, kFinalNormName, spec.hidden_size));
  plan.head_bytes = PackedBytes(head) + NormBytes(spec.hidden_size);
  plan.rope_bytes = RopeBytes(spec, max_context);
  plan.weight_bytes = plan.embedding_bytes + plan.layer_bytes + plan.head_bytes + plan.rope_bytes;
  plan.kv_block_bytes = KvBlockBytes(spec, share, options.numerics);
  const ActivationPlan activations =
      PlanActivations(spec, share, options, max_context, vocab_share_max);
  plan.activation_bytes = activations.activation_bytes();
  plan.workspace_bytes = activations.workspace_bytes();
  return plan;
}

}  // namespace

absl::Status CheckMemoryOptions(const model::ModelSpec& spec, const MemoryOptions& options) {
  RETURN_IF_ERROR(CheckRange("max slots", options.max_slots, 1, kMaxSlots));
  RETURN_IF_ERROR(CheckRange("max step tokens", options.max_step_tokens, 1, kMaxStepTokens));
  RETURN_IF_ERROR(CheckRange("threads", options.threads, 1, kMaxThreads));
  RETURN_IF_ERROR(CheckRange("max context", options.max_context, 0, spec.context_limit));
  RETURN_IF_ERROR(
      CheckRange("memory bytes", options.memory_bytes, 0, std::numeric_limits<int64_t>::max()));
  return CheckRange("KV blocks", options.kv_blocks, 0, std::numeric_limits<int32_t>::max());
}

absl::StatusOr<int32_t> KvBlocksWithin(const RankMemoryPlan& rank, const MemoryOptions& options,
                                       int32_t max_context) {
  const int64_t sequence_blocks = SequenceBlocks(max_context);
  const int64_t fixed =
      rank.weight_bytes + rank.activation_bytes + rank.workspace_bytes + rank.graph_bytes;
  if (options.memory_bytes == 0) {
    if (options.kv_blocks > 0) return options.kv_blocks;
    const int64_t wanted = options.max_slots * sequence_blocks;
    const int64_t capped =
        std::min(wanted, std::max(sequence_blocks, kDefaultKvBytes / rank.kv_block_bytes));
    return static_cast<int32_t>(std::min<int64_t>(capped, std::numeric_limits<int32_t>::max()));
  }
  const int64_t least = options.kv_blocks > 0 ? options.kv_blocks : sequence_blocks;
  const int64_t left = options.memory_bytes - fixed;
  if (left < least * rank.kv_block_bytes) {
    return absl::ResourceExhaustedError(Message(
        "rank ", rank.share.rank, " of ", rank.share.rank_count, " needs ",
        FormatBytes(fixed + least * rank.kv_block_bytes), ": weights ",
        FormatBytes(rank.weight_bytes), ", activations ", FormatBytes(rank.activation_bytes),
        ", workspace ", FormatBytes(rank.workspace_bytes), ", ", least, " KV blocks ",
        FormatBytes(least * rank.kv_block_bytes), " (one sequence of ", max_context,
        " positions takes ", sequence_blocks, "); the budget is ",
        FormatBytes(options.memory_bytes)));
  }
  if (options.kv_blocks > 0) return options.kv_blocks;
  return static_cast<int32_t>(
      std::min<int64_t>(left / rank.kv_block_bytes, std::numeric_limits<int32_t>::max()));
}

absl::StatusOr<PackedFormat> HeadPackedFormat(const Checkpoint& checkpoint, const RankShare& share,
                                              const MemoryOptions& options) {
  ASSIGN_OR_RETURN(PackedFormat format, DescribeRankHead(checkpoint, share));
  const bool narrow = format.kind == PackedKind::kDense && format.type != FloatType::kF32;
  if (narrow && options.numerics == Numerics::kFast && options.head == HeadFormat::kInt8 &&
      format.columns % layout::kInt8Group == 0) {
    format.kind = PackedKind::kInt8;
    format.group = layout::kInt8Group;
  }
  return format;
}

absl::StatusOr<int64_t> EmbeddingBytes(const Checkpoint& checkpoint, const RankShare& share) {
  const model::ModelSpec& spec = checkpoint.spec();
  ASSIGN_OR_RETURN(const FloatType type,
                   checkpoint.DescribeDense(kEmbeddingName, {spec.vocab_size, spec.hidden_size}));
  return AlignedBytes(int64_t{share.vocab.count()} * spec.hidden_size * FloatTypeBytes(type));
}

absl::StatusOr<int64_t> LayerBytes(const Checkpoint& checkpoint, const RankShare& share,
                                   int32_t layer) {
  ASSIGN_OR_RETURN(const LayerFormats formats, DescribeLayer(checkpoint, share, layer));
  int64_t bytes = PackedBytes(formats.qkv) + PackedBytes(formats.o) + PackedBytes(formats.gate_up) +
                  PackedBytes(formats.down);
  for (const NormTensor& norm : LayerNorms(checkpoint.spec(), layer)) {
    RETURN_IF_ERROR(CheckNorm(checkpoint, norm.name, norm.size));
    bytes += NormBytes(norm.size);
  }
  return bytes;
}

int64_t RopeBytes(const model::ModelSpec& spec, int32_t max_context) {
  return 2 * AlignedBytes(int64_t{4} * max_context * (spec.head_dim / 2));
}

int64_t KvBlockBytes(const model::ModelSpec& spec, const RankShare& share, Numerics numerics) {
  const int64_t element = numerics == Numerics::kFast ? 2 : 4;
  return int64_t{2} * spec.layer_count * share.kv_heads.count() * spec.head_dim * kBlockTokens *
         element;
}

absl::StatusOr<MemoryPlan> PlanMemory(const Checkpoint& checkpoint, int32_t rank_count,
                                      const MemoryOptions& options) {
  const model::ModelSpec& spec = checkpoint.spec();
  RETURN_IF_ERROR(CheckMemoryOptions(spec, options));
  ASSIGN_OR_RETURN(const std::vector<RankShare> shares, PlanShares(checkpoint, rank_count));
  int32_t vocab_share_max = 0;
  for (const RankShare& share : shares) {
    vocab_share_max = std::max(vocab_share_max, share.vocab.count());
  }
  MemoryPlan plan;
  plan.options = options;
  plan.max_context = options.max_context > 0 ? options.max_context : spec.max_context;
  for (const RankShare& share : shares) {
    ASSIGN_OR_RETURN(RankMemoryPlan rank,
                     PlanRank(checkpoint, share, options, plan.max_context, vocab_share_max));
    ASSIGN_OR_RETURN(rank.kv_blocks, KvBlocksWithin(rank, options, plan.max_context));
    plan.kv_blocks = plan.ranks.empty() ? rank.kv_blocks : std::min(plan.kv_blocks, rank.kv_blocks);
    plan.ranks.push_back(rank);
  }
  // A block id is the same on every rank.
  for (RankMemoryPlan& rank : plan.ranks) rank.kv_blocks = plan.kv_blocks;
  return plan;
}

}  // namespace nibble::weights
