#include "worker/execution/cpu/cpu_executor.h"

#include <algorithm>
#include <array>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"
#include "worker/collectives/event_word.h"
#include "worker/execution/cpu/decoder.h"
#include "worker/execution/cpu/plan_check.h"
#include "worker/execution/cpu/sampler_stage.h"
#include "worker/execution/cpu/step_queue.h"

namespace nibble::execution {
namespace {

step::ExecutorLimits LimitsOf(const weights::MemoryPlan& plan, const model::ModelSpec& spec,
                              const weights::MemoryOptions& memory) {
  return {.vocab_size = spec.vocab_size,
          .max_context = plan.max_context,
          .max_slots = memory.max_slots,
          .max_step_tokens = memory.max_step_tokens,
          .kv_blocks = plan.kv_blocks};
}

std::vector<weights::Range> VocabShares(const weights::MemoryPlan& plan) {
  std::vector<weights::Range> shares;
  for (const weights::RankMemoryPlan& rank : plan.ranks) shares.push_back(rank.share.vocab);
  return shares;
}

int32_t LargestShare(const std::vector<weights::Range>& shares) {
  int32_t largest = 0;
  for (const weights::Range& share : shares) largest = std::max(largest, share.count());
  return largest;
}

// Keys and values of every layer in one mapping, untouched until blocks are written.
std::vector<cpu::KvCache> SplitKvMemory(const MappedMemory& memory, const ModelShard& model,
                                        weights::Numerics numerics) {
  const int32_t layers = model.spec().layer_count;
  const int64_t half = memory.bytes() / (2 * layers);
  std::vector<cpu::KvCache> caches;
  for (int32_t layer = 0; layer < layers; ++layer) {
    char* keys = memory.as<char>() + 2 * layer * half;
    caches.push_back({.keys = keys,
                      .values = keys + half,
                      .type = numerics == weights::Numerics::kFast ? cpu::ElementType::kF16
                                                                   : cpu::ElementType::kF32,
                      .kv_heads = model.share().kv_heads.count(),
                      .head_dim = model.spec().head_dim});
  }
  return caches;
}

}  // namespace

struct CpuExecutor::State {
  State(std::unique_ptr<ModelShard> shard, const weights::MemoryPlan& plan,
        collectives::Communicator* group, const CpuExecutorOptions& settings);
  ~State();

  void DriverLoop();
  void RunStep(const step::StepPlan& plan, std::span<const step::SlotSetup> opened,
               step::StepResult* result);

  const CpuExecutorOptions options;
  const std::unique_ptr<ModelShard> model;
  const step::ExecutorLimits limits;
  PlanChecker checker;
  StepQueue queue;

  // Everything below belongs to the driver thread (and its helpers during a step).
  Arena activations;
  Arena workspace;
  MappedMemory kv_memory;
  Buffers buffers;
  SlotTable slots;
  ThreadTeam team;
  InputConverter converter;
  RankContext context;
  std::unique_ptr<SamplerStage> sampler;
  std::unique_ptr<Decoder> decoder;
  StepRows::Layout layout;
  std::thread driver;
};

CpuExecutor::State::State(std::unique_ptr<ModelShard> shard, const weights::MemoryPlan& plan,
                          collectives::Communicator* group, const CpuExecutorOptions& settings)
    : options(settings),
      model(std::move(shard)),
      limits(LimitsOf(plan, model->spec(), options.memory)),
      checker(limits),
      kv_memory(weights::KvBlockBytes(model->spec(), model->share(), options.memory.numerics) *
                limits.kv_blocks),
      buffers(AllocateBuffers(*model,
                              {.memory = options.memory,
                               .threads = options.threads,
                               .vocab_share_max = LargestShare(VocabShares(plan))},
                              &activations, &workspace)),
      slots(limits),
      team(options.threads, collectives::SpinBudget(options.threads * group->size())),
      converter(&cpu::GetKernels(options.isa), &team, &buffers) {
  context.kernels = &cpu::GetKernels(options.isa);
  context.model = model.get();
  context.communicator = group;
  context.team = &team;
  context.buffers = &buffers;
  context.converter = &converter;
  context.slots = &slots;
  context.kv_caches = SplitKvMemory(kv_memory, *model, options.memory.numerics);
  layout = {.heads = model->share().heads.count(),
            .kv_heads = model->share().kv_heads.count(),
            .threads = options.threads};
  context.rows.Reserve(limits, layout);
  sampler = std::make_unique<SamplerStage>(&context, VocabShares(plan),
                                           [this] { return queue.WaitForMasks(); });
  decoder = std::make_unique<Decoder>(&context, sampler.get(), options.on_progress_stamp);
  driver = std::thread([this] { DriverLoop(); });
}

CpuExecutor::State::~State() {
  queue.Stop();
  driver.join();
}

void CpuExecutor::State::DriverLoop() {
  StepQueue::Entry* entry = nullptr;
  while ((entry = queue.NextToRun()) != nullptr) {
    RunStep(entry->plan, entry->opened(), &entry->result);
    queue.FinishRun(context.status);
  }
}

void CpuExecutor::State::RunStep(const step::StepPlan& plan,
                                 std::span<const step::SlotSetup> opened,
                                 step::StepResult* result) {
  const auto begin = std::chrono::steady_clock::now();
  result->Clear();
  result->step_id = plan.step_id;
  context.plan = &plan;
  context.status = absl::OkStatus();
  context.collective_ns = 0;
  for (const step::SlotSetup& setup : opened) slots.Open(setup);
  for (const step::SequenceStep& sequence : plan.sequences) {
    slots.SetBlocks(sequence.slot, sequence.block_table_index,
                    std::span(plan.block_ids)
                        .subspan(static_cast<size_t>(sequence.block_begin),
                                 static_cast<size_t>(sequence.block_count)));
  }
  context.rows.Build(plan, slots, layout);
  if (context.tokens() == 0) return;
  team.Run(decoder.get());
  if (!context.status.ok()) return;
  sampler->Finish(result);
  const auto end = std::chrono::steady_clock::now();
  const Deadline sampling = decoder->sampling_began();
  result->timings = {.forward_ns = (sampling - begin).count(),
                     .sample_ns = (end - sampling).count(),
                     .collective_ns = context.collective_ns};
}

CpuExecutor::CpuExecutor(std::unique_ptr<State> state) : state_(std::move(state)) {}
CpuExecutor::~CpuExecutor() = default;

absl::StatusOr<std::unique_ptr<CpuExecutor>> CpuExecutor::Create(
    const weights::Checkpoint& checkpoint, const weights::MemoryPlan& plan,
    collectives::Communicator* communicator, CpuExecutorOptions options) {
  if (options.threads < 1 || options.threads > 1024) {
    return absl::InvalidArgumentError(
        absl::StrCat("compute threads is ", options.threads, "; allowed: 1 ... 1024"));
  }
  if (!cpu::IsaLevelSupported(options.isa)) {
    return absl::InvalidArgumentError(absl::StrCat("this CPU does not have the instruction set ",
                                                   std::string(cpu::IsaLevelName(options.isa))));
  }
  if (communicator->size() != static_cast<int32_t>(plan.ranks.size())) {
    return absl::InvalidArgumentError(absl::StrCat("the memory plan is for ", plan.ranks.size(),
                                                   " ranks, the group has ", communicator->size()));
  }
  const weights::RankMemoryPlan& mine = plan.ranks[static_cast<size_t>(communicator->rank())];
  ASSIGN_OR_RETURN(auto model, ModelShard::Load(checkpoint, mine.share,
                                                {.memory = options.memory,
                                                 .max_context = plan.max_context,
                                                 .planned_bytes = mine.weight_bytes,
                                                 .threads = options.threads,
                                                 .progress = options.progress}));
  return std::unique_ptr<CpuExecutor>(
      new CpuExecutor(std::make_unique<State>(std::move(model), plan, communicator, options)));
}

absl::Status CpuExecutor::Launch(const step::StepPlan& plan) {
  RETURN_IF_ERROR(state_->checker.Check(plan));
  return state_->queue.Launch(plan);
}

absl::Status CpuExecutor::ProvideMasks(const step::MaskBatch& masks) {
  return state_->queue.ProvideMasks(masks);
}

absl::Status CpuExecutor::Wait(Deadline deadline, step::StepResult* result) {
  return state_->queue.Wait(deadline, result);
}

const step::ExecutorLimits& CpuExecutor::limits() const { return state_->limits; }

MemoryUse CpuExecutor::memory_use() const {
  return {.weights = state_->model->bytes(),
          .kv_cache = state_->kv_memory.bytes(),
          .activations = state_->activations.bytes(),
          .workspace =
              state_->workspace.bytes() + state_->slots.bytes() + state_->sampler->scratch_bytes()};
}

void CpuExecutor::set_logits_observer(LogitsObserver observer) {
  state_->sampler->set_observer(std::move(observer));
}

}  // namespace nibble::execution
