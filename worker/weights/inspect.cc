#include "worker/weights/inspect.h"

#include <algorithm>

#include "base/status.h"
#include "worker/weights/linear_shapes.h"

namespace nibble::weights {
namespace {

bool SameStorage(const LinearInfo& a, const LinearInfo& b) {
  return a.layout == b.layout && a.group_size == b.group_size && a.stored_type == b.stored_type;
}

void Count(const LinearInfo& info, std::vector<StorageSummary>* storage) {
  auto found = std::find_if(storage->begin(), storage->end(), [&](const StorageSummary& entry) {
    return entry.layout == info.layout && entry.group_size == info.group_size &&
           entry.stored_type == info.stored_type;
  });
  if (found == storage->end()) {
    storage->push_back({info.layout, info.group_size, info.stored_type, 0, 0});
    found = storage->end() - 1;
  }
  ++found->linear_count;
  found->weight_count += int64_t{info.rows} * info.columns;
}

int64_t Parameters(const LinearInfo& info) {
  return int64_t{info.rows} * info.columns + (info.has_bias ? info.rows : 0);
}

absl::Status AddLayers(const Checkpoint& checkpoint, CheckpointReport* report) {
  for (int32_t layer = 0; layer < checkpoint.spec().layer_count; ++layer) {
    std::vector<LinearInfo> linears;
    for (const LinearRole role : kLinearRoles) {
      ASSIGN_OR_RETURN(const LinearInfo info, checkpoint.DescribeLinear(LinearName(layer, role)));
      Count(info, &report->storage);
      report->parameter_count += Parameters(info);
      linears.push_back(info);
    }
    for (const NormTensor& norm : LayerNorms(checkpoint.spec(), layer)) {
      RETURN_IF_ERROR(checkpoint.DescribeDense(norm.name, {norm.size}).status());
      report->parameter_count += norm.size;
    }
    if (!report->layers.empty() &&
        std::equal(linears.begin(), linears.end(), report->layers.back().linears.begin(),
                   &SameStorage)) {
      report->layers.back().last_layer = layer;
    } else {
      report->layers.push_back({layer, layer, std::move(linears)});
    }
  }
  std::stable_sort(report->storage.begin(), report->storage.end(),
                   [](const StorageSummary& a, const StorageSummary& b) {
                     return a.weight_count > b.weight_count;
                   });
  return absl::OkStatus();
}

bool EvenShares(const std::vector<RankShare>& shares) {
  const RankShare& first = shares.front();
  return std::all_of(shares.begin(), shares.end(), [&](const RankShare& share) {
    return share.heads.count() == first.heads.count() &&
           share.kv_heads.count() == first.kv_heads.count() &&
           share.ffn.count() == first.ffn.count() && share.vocab.count() == first.vocab.count();
  });
}

DegreeSummary SummarizeDegree(const Checkpoint& checkpoint, MemoryOptions options,
                              int32_t rank_count) {
  // Only the weights are asked for here, which no budget bounds.
  options.memory_bytes = 0;
  DegreeSummary summary;
  summary.rank_count = rank_count;
  summary.kv_replicated = rank_count > checkpoint.spec().kv_head_count;
  const auto plan = PlanMemory(checkpoint, rank_count, options);
  summary.possible = plan.status();
  if (!plan.ok()) return summary;
  std::vector<RankShare> shares;
  for (const RankMemoryPlan& rank : plan->ranks) {
    shares.push_back(rank.share);
    summary.weight_bytes.push_back(rank.weight_bytes);
  }
  summary.even = EvenShares(shares);
  return summary;
}

}  // namespace

absl::StatusOr<CheckpointReport> InspectCheckpoint(const Checkpoint& checkpoint,
                                                   const MemoryOptions& options,
                                                   int32_t degrees_max) {
  const model::ModelSpec& spec = checkpoint.spec();
  CheckpointReport report;
  for (const auto& file : checkpoint.files()) {
    FileSummary summary;
    summary.name = file->name();
    summary.tensor_count = static_cast<int64_t>(file->tensors().size());
    for (const auto& [name, view] : file->tensors()) {
      summary.tensor_bytes += static_cast<int64_t>(view.data.size());
    }
    report.stored_bytes += summary.tensor_bytes;
    report.files.push_back(std::move(summary));
  }
  RETURN_IF_ERROR(AddLayers(checkpoint, &report));
  ASSIGN_OR_RETURN(report.head, checkpoint.DescribeHead());
  ASSIGN_OR_RETURN(report.embedding_type,
                   checkpoint.DescribeDense(kEmbeddingName, {spec.vocab_size, spec.hidden_size}));
  RETURN_IF_ERROR(checkpoint.DescribeDense(kFinalNormName, {spec.hidden_size}).status());
  report.parameter_count += int64_t{spec.vocab_size} * spec.hidden_size + spec.hidden_size;
  if (!spec.tied_head) report.parameter_count += Parameters(report.head);
  for (int32_t ranks = 1; ranks <= std::min(degrees_max, spec.head_count); ++ranks) {
    report.degrees.push_back(SummarizeDegree(checkpoint, options, ranks));
  }
  return report;
}

absl::StatusOr<PlanReport> ReportPlan(const Checkpoint& checkpoint, int32_t rank_count,
                                      const MemoryOptions& options) {
  PlanReport report;
  ASSIGN_OR_RETURN(report.plan, PlanMemory(checkpoint, rank_count, options));
  int32_t vocab_share_max = 0;
  for (const RankMemoryPlan& rank : report.plan.ranks) {
    vocab_share_max = std::max(vocab_share_max, rank.share.vocab.count());
  }
  for (const RankMemoryPlan& rank : report.plan.ranks) {
    report.activations.push_back(PlanActivations(checkpoint.spec(), rank.share, options,
                                                 report.plan.max_context, vocab_share_max));
  }
  report.sequence_blocks = (report.plan.max_context + kBlockTokens - 1) / kBlockTokens;
  report.sequences = std::min(options.max_slots, report.plan.kv_blocks / report.sequence_blocks);
  return report;
}

}  // namespace nibble::weights
