#include "worker/planned_model.h"

#include <utility>

#include "base/version.h"
#include "worker/fnv.h"
#include "worker/weights/machine_memory.h"

namespace nibble::worker {
namespace {

constexpr weights::MemoryOptions PlainOptions(const weights::MemoryOptions& options) {
  weights::MemoryOptions plain;
  plain.numerics = options.numerics;
  plain.head = options.head;
  return plain;
}

absl::StatusOr<weights::MemoryPlan> Plan(const WorkerOptions& options,
                                         const execution::GpuInfo* gpu,
                                         const weights::Checkpoint& checkpoint) {
  if (!OnGpu(options)) return weights::PlanMemory(checkpoint, options.tp, options.memory);
  return execution::PlanGpuMemory({.checkpoint = &checkpoint}, options.tp,
                                  {.memory = options.memory,
                                   .fusion = options.fusion,
                                   .gpu = gpu,
                                   .memory_fraction = options.memory_fraction,
                                   .one_machine = PlaceOf(options).machines == 1});
}

weights::MemoryPlan OfThisMachine(const WorkerOptions& options, weights::MemoryPlan plan) {
  const group::RankRange own = PlaceOf(options).own_ranks();
  std::erase_if(plan.ranks, [&own](const weights::RankMemoryPlan& rank) {
    return !own.Contains(rank.share.rank);
  });
  return plan;
}

}  // namespace

Failure OpenAndPlan(const WorkerOptions& options, const execution::GpuInfo* gpu,
                    PlannedModel* model) {
  auto checkpoint = weights::Checkpoint::Open(options.model);
  if (!checkpoint.ok()) return {.exit_code = kExitModel, .status = checkpoint.status()};
  model->checkpoint = *std::move(checkpoint);
  auto plan = Plan(options, gpu, *model->checkpoint);
  if (plan.ok()) {
    model->plan = *std::move(plan);
    if (OnGpu(options)) return {};
    absl::Status fits =
        weights::CheckFits(OfThisMachine(options, model->plan), weights::MachineMemory());
    if (fits.ok()) return {};
    return {.exit_code = kExitNoMemory, .status = std::move(fits)};
  }
  Failure failure{.exit_code = kExitModel, .status = plan.status()};
  if (absl::IsResourceExhausted(plan.status())) {
    failure.exit_code = kExitNoMemory;
  } else if (weights::PlanMemory(*model->checkpoint, 1, PlainOptions(options.memory)).ok()) {
    failure.exit_code = kExitConfiguration;  // the folder is sound, what was asked of it is not
  }
  return failure;
}

group::RankFacts FactsOf(const WorkerOptions& options, const PlannedModel& model) {
  return {.model_hash = model.checkpoint->IdentityHash(),
          .config_hash = ConfigHash(options),
          .build_hash = Fnv1a(VersionLine("nibble-worker")),
          .rank_count = options.tp,
          .kv_blocks = model.plan.kv_blocks};
}

group::GroupFacts MetricFactsOf(const WorkerOptions& options, const PlannedModel& model) {
  const weights::QuantizationConfig& quantization = model.checkpoint->quantization();
  const bool quantized = quantization.layout != weights::Layout::kNone;
  return {.model = options.model_name,
          .architecture = model.checkpoint->spec().architecture,
          .quantization = weights::LayoutName(quantization.layout),
          .group_size = quantized ? quantization.group_size : 0,
          .tensor_parallel = options.tp,
          .ranks = PlaceOf(options).own_ranks(),
          .numerics = NumericsWord(options.memory.numerics),
          .head = HeadWord(options.memory.head),
          .max_context = model.plan.max_context,
          .device = options.device};
}

}  // namespace nibble::worker
