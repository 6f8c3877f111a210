#include "worker/rank.h"

#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/exit_codes.h"
#include "base/logging.h"
#include "base/status.h"
#include "base/units.h"
#include "worker/collectives/event_word.h"
#include "worker/collectives/gloo_communicator.h"
#include "worker/collectives/self_communicator.h"
#include "worker/collectives/shm_communicator.h"
#include "worker/counted.h"
#include "worker/execution/cpu/cpu_executor.h"
#include "worker/execution/cuda/gpu_rank.h"
#include "worker/follower.h"
#include "worker/group/group_control.h"
#include "worker/group/peer_watch.h"
#include "worker/group/shared_memory.h"
#include "worker/leader_loop.h"
#include "worker/planned_model.h"
#include "worker/rpc/leader.h"
#include "worker/step/plan_ring.h"
#include "worker/warm_up.h"

namespace nibble::worker {
namespace {

constexpr int64_t kTokenizerBytesMax = int64_t{64} << 20;
// The supervisor watches over the loading; this only keeps a lost process from waiting for ever.
constexpr Duration kMeetingTime = std::chrono::hours(1);
constexpr Duration kWarmUpTime = std::chrono::minutes(2);
constexpr Duration kChunkTimeMax = std::chrono::seconds(1);
constexpr Duration kIdleStampMax = std::chrono::milliseconds(500);

int ServingExitCode(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitDrained;
    case absl::StatusCode::kInvalidArgument:  // the address
      return kExitConfiguration;
    case absl::StatusCode::kDataLoss:  // the logits
      return kExitModel;
    case absl::StatusCode::kDeadlineExceeded:
      return kExitHang;
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kUnavailable:
      return kExitRankLost;
    default:
      return kExitDeviceFault;
  }
}

int LoadingExitCode(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kFailedPrecondition:  // NCCL is missing
      return kExitNoMemory;
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kDeadlineExceeded:  // a peer's GPU
      return kExitRankLost;
    default:
      return kExitModel;
  }
}

// Nobody else knows it, not even the next start of this group.
absl::StatusOr<std::string> RandomKey() {
  std::string key(32, '\0');
  if (::getrandom(key.data(), key.size(), 0) != static_cast<ssize_t>(key.size())) {
    return absl::InternalError("there are no random numbers to be had");
  }
  return key;
}

class Rank {
 public:
  Rank(const WorkerOptions& options, const RankArguments& arguments, group::GroupControl* control,
       step::GroupStats* stats)
      : options_(options),
        arguments_(arguments),
        control_(control),
        group_stats_(stats),
        stats_(&stats->ranks[static_cast<size_t>(arguments.rank)]),
        slot_(&control->ranks[static_cast<size_t>(arguments.rank)]) {}

  Failure Run() {
    if (Failure failure = Load(); !failure.ok()) return failure;
    absl::Status status = Meet();
    if (!status.ok()) return {.exit_code = kExitRankLost, .status = std::move(status)};
    stats_->up.Set(1);
    status = arguments_.rank == 0 ? RunLeader() : RunAsFollower();
    stats_->up.Set(0);
    return {.exit_code = ServingExitCode(status), .status = std::move(status)};
  }

 private:
  Failure Load();
  absl::Status Connect();
  absl::Status CreateExecutor();
  absl::Status CreateOnCpu();
  absl::Status CreateOnGpu();
  void LogGpuPlan() const;
  absl::Status Meet();
  absl::Status RunLeader();
  absl::Status RunAsFollower();
  absl::Status StartLeader(rpc::LeaderOptions* options);
  [[nodiscard]] rpc::TokenizerFiles ReadTokenizerFiles() const;
  [[nodiscard]] v1::GetModelInfoResponse ModelInfo(int32_t context) const;
  [[nodiscard]] bool AllUp() const;
  // Of collectives and the ring. The first steps may take as long as the warm-up; once the group
  // serves, the engine, the followers and the supervisor hold every step to its own deadline.
  [[nodiscard]] Duration PeerPatience() const {
    return std::max(options_.step_deadline, kWarmUpTime);
  }
  [[nodiscard]] step::PlanRingWait RingWait() const {
    const int32_t waiting = PlaceOf(options_).ranks_each * options_.threads;
    const bool a_core_each = collectives::SpinBudget(waiting) > Duration::zero();
    return {.clock = &clock_,
            .spin = a_core_each ? Duration(std::chrono::microseconds(20)) : Duration::zero()};
  }

  const WorkerOptions& options_;
  const RankArguments arguments_;
  group::GroupControl* const control_;
  step::GroupStats* const group_stats_;
  step::RankStats* const stats_;
  group::RankSlot* const slot_;
  SteadyClock clock_;

  PlannedModel model_;
  std::unique_ptr<collectives::ShmRegion> region_;
  std::unique_ptr<collectives::Communicator> communicator_;
  std::unique_ptr<CountedCommunicator> counted_communicator_;
  execution::GpuInfo gpu_;
  std::function<void()> abort_gpu_;
  std::unique_ptr<step::Executor> executor_;
  std::unique_ptr<CountedExecutor> counted_executor_;
};

Failure Rank::Load() {
  const Deadline begin = clock_.Now();
  if (OnGpu(options_)) {
    auto gpu = execution::OpenGpu(arguments_.rank - PlaceOf(options_).own_ranks().first);
    if (!gpu.ok()) return {.exit_code = kExitNoMemory, .status = gpu.status()};
    gpu_ = *std::move(gpu);
  }
  if (Failure failure = OpenAndPlan(options_, &gpu_, &model_); !failure.ok()) return failure;
  group::Handshake handshake(control_, arguments_.rank, options_.tp, &clock_);
  const absl::StatusOr<int32_t> kv_blocks =
      handshake.Introduce(FactsOf(options_, model_), begin + kMeetingTime);
  if (!kv_blocks.ok()) {
    const bool differs = absl::IsFailedPrecondition(kv_blocks.status());
    return {.exit_code = differs ? kExitModel : kExitRankLost, .status = kv_blocks.status()};
  }
  model_.plan.kv_blocks = *kv_blocks;
  absl::Status status = Connect();
  if (!status.ok()) return {.exit_code = kExitConfiguration, .status = std::move(status)};
  status = CreateExecutor();
  if (!status.ok()) return {.exit_code = LoadingExitCode(status), .status = std::move(status)};
  stats_->startup_load_ns.Set((clock_.Now() - begin).count());
  return {};
}

absl::Status Rank::Connect() {
  const group::MachinePlace place = PlaceOf(options_);
  if (options_.tp == 1) {
    communicator_ = collectives::MakeSelfCommunicator();
  } else if (place.machines > 1) {
    const group::Rendezvous& meeting = control_->rendezvous;
    ASSIGN_OR_RETURN(communicator_, collectives::MakeGlooCommunicator(
                                        {.rank = arguments_.rank,
                                         .size = options_.tp,
                                         .bind_address = meeting.own_address.Get().value_or(""),
                                         .store_host = meeting.host.Get().value_or(""),
                                         .store_port = static_cast<uint16_t>(meeting.port.load()),
                                         .group_key = meeting.key,
                                         .timeout = PeerPatience()}));
  } else {
    ASSIGN_OR_RETURN(auto region, collectives::ShmRegion::Attach(arguments_.collectives_fd));
    region_ = std::make_unique<collectives::ShmRegion>(std::move(region));
    ASSIGN_OR_RETURN(communicator_, collectives::MakeShmCommunicator(
                                        region_.get(), arguments_.rank,
                                        {.timeout = PeerPatience(),
                                         .waiting_threads = options_.tp * options_.threads}));
  }
  counted_communicator_ = std::make_unique<CountedCommunicator>(communicator_.get(), stats_);
  return absl::OkStatus();
}

absl::Status Rank::CreateExecutor() {
  RETURN_IF_ERROR(OnGpu(options_) ? CreateOnGpu() : CreateOnCpu());
  counted_executor_ = std::make_unique<CountedExecutor>(executor_.get(), &clock_, stats_);
  const weights::RankMemoryPlan& plan = model_.plan.ranks[static_cast<size_t>(arguments_.rank)];
  stats_->weights_planned_bytes.Set(plan.weight_bytes);
  stats_->kv_cache_planned_bytes.Set(plan.kv_block_bytes * model_.plan.kv_blocks);
  stats_->activations_planned_bytes.Set(plan.activation_bytes);
  stats_->workspace_planned_bytes.Set(plan.workspace_bytes);
  stats_->graphs_planned_bytes.Set(plan.graph_bytes);
  return absl::OkStatus();
}

absl::Status Rank::CreateOnGpu() {
  LogGpuPlan();
  ASSIGN_OR_RETURN(
      execution::GpuExecutor made,
      execution::CreateGpuExecutor(gpu_, {.checkpoint = model_.checkpoint.get()}, model_.plan,
                                   {.rank = arguments_.rank,
                                    .fusion = options_.fusion,
                                    .activations = options_.activations,
                                    .communicator = communicator_.get(),
                                    .one_machine = PlaceOf(options_).machines == 1,
                                    .peer_patience = PeerPatience(),
                                    .on_exchanged_bytes =
                                        [stats = stats_](int64_t bytes) {
                                          stats->collective_bytes.Add(static_cast<uint64_t>(bytes));
                                        },
                                    .progress =
                                        [slot = slot_](int64_t done, int64_t total) {
                                          slot->load_bytes_total = total;
                                          slot->load_bytes_done = done;
                                        }}));
  executor_ = std::move(made.executor);
  abort_gpu_ = std::move(made.abort);
  stats_->weights_bytes.Set(made.memory.weights);
  stats_->kv_cache_bytes.Set(made.memory.kv_cache);
  stats_->activations_bytes.Set(made.memory.activations);
  stats_->workspace_bytes.Set(made.memory.workspace);
  stats_->graphs_bytes.Set(made.memory.graphs);
  stats_->context_bytes.Set(made.memory.context);
  return absl::OkStatus();
}

void Rank::LogGpuPlan() const {
  const weights::RankMemoryPlan& rank = model_.plan.ranks[static_cast<size_t>(arguments_.rank)];
  spdlog::info(
      "GPU {} ({}, {} free of {}), {}: plans {}: weights {}, KV cache {} in {} blocks, activations "
      "{}, workspace {}, graphs {}",
      gpu_.ordinal, gpu_.name, FormatBytes(gpu_.free_bytes), FormatBytes(gpu_.total_bytes),
      execution::ElementWord(execution::ElementOf(options_.activations, model_.checkpoint->spec())),
      FormatBytes(rank.total_bytes()), FormatBytes(rank.weight_bytes),
      FormatBytes(rank.kv_block_bytes * model_.plan.kv_blocks), model_.plan.kv_blocks,
      FormatBytes(rank.activation_bytes), FormatBytes(rank.workspace_bytes),
      FormatBytes(rank.graph_bytes));
}

absl::Status Rank::CreateOnCpu() {
  execution::CpuExecutorOptions options;
  options.memory = options_.memory;
  options.threads = options_.threads;
  options.progress = [slot = slot_](int64_t done, int64_t total) {
    slot->load_bytes_total = total;
    slot->load_bytes_done = done;
  };
  options.on_progress_stamp = [stats = stats_, clock = &clock_] {
    stats->progress_ns.Set(clock->Now().time_since_epoch().count());
  };
  ASSIGN_OR_RETURN(auto executor,
                   execution::CpuExecutor::Create(*model_.checkpoint, model_.plan,
                                                  counted_communicator_.get(), std::move(options)));
  const execution::MemoryUse use = executor->memory_use();
  executor_ = std::move(executor);
  stats_->weights_bytes.Set(use.weights);
  stats_->kv_cache_bytes.Set(use.kv_cache);
  stats_->activations_bytes.Set(use.activations);
  stats_->workspace_bytes.Set(use.workspace);
  return absl::OkStatus();
}

absl::Status Rank::Meet() {
  group::Handshake handshake(control_, arguments_.rank, options_.tp, &clock_);
  return handshake.AwaitLoaded(clock_.Now() + kMeetingTime);
}

bool Rank::AllUp() const {
  const auto begin = group_stats_->ranks.begin();
  return std::all_of(begin, begin + options_.tp,
                     [](const step::RankStats& rank) { return rank.up.Get() != 0; });
}

absl::Status Rank::RunAsFollower() {
  // The leader reads no plans, so on its machine the others count from rank 1.
  const int32_t first = std::max(PlaceOf(options_).own_ranks().first, 1);
  ASSIGN_OR_RETURN(
      const auto receiver,
      step::PlanRingReader::Attach(arguments_.ring_fd, arguments_.rank - first, RingWait()));
  slot_->phase.store(group::RankPhase::kServing, std::memory_order_release);
  return RunFollower(receiver.get(), counted_executor_.get(),
                     {.step_deadline = options_.step_deadline,
                      .serving = [this] { return control_->address.written(); },
                      .warm_up_deadline = kWarmUpTime,
                      .idle_stamp = std::min(kIdleStampMax, options_.step_deadline / 8),
                      .clock = &clock_,
                      .stats = stats_});
}

absl::Status Rank::RunLeader() {
  std::unique_ptr<step::PlanRingWriter> publisher;
  if (options_.tp > 1) {
    ASSIGN_OR_RETURN(publisher,
                     step::PlanRingWriter::Attach(arguments_.ring_fd, PeerPatience(), RingWait()));
  }
  // A step with a prompt stays well below the deadline.
  const Duration chunk_time = std::min(kChunkTimeMax, options_.step_deadline / 4);
  ASSIGN_OR_RETURN(const WarmUpResult warm_up,
                   WarmUp(counted_executor_.get(), publisher.get(), clock_,
                          {.deadline = clock_.Now() + kWarmUpTime, .chunk_time = chunk_time}));
  spdlog::info("prefill runs at {:.0f} tokens/s; a step takes at most {} prompt tokens",
               warm_up.prefill_tokens_per_second, warm_up.prefill_chunk_tokens);

  const step::ExecutorLimits& limits = counted_executor_->limits();
  const int32_t context = std::min(limits.max_context, limits.kv_blocks * step::kBlockTokens);
  const rpc::TokenizerFiles files = ReadTokenizerFiles();
  rpc::LeaderOptions options;
  options.engine = {.queue_size = options_.queue_size,
                    .prefill_chunk_tokens = warm_up.prefill_chunk_tokens,
                    .prefill_chunk_time = chunk_time,
                    .step_deadline = options_.step_deadline,
                    .prefix_cache = options_.prefix_cache,
                    .model_identity = absl::StrCat(model_.checkpoint->IdentityHash())};
  ASSIGN_OR_RETURN(options.engine.prefix_key, RandomKey());
  options.executor = counted_executor_.get();
  options.publisher = publisher.get();
  options.clock = &clock_;
  options.stats = &group_stats_->engine;
  ASSIGN_OR_RETURN(options.server.listen, rpc::ParseListenAddress(options_.listen));
  options.server.tls = options_.tls;
  options.server.tls_stats = &group_stats_->listen_tls;
  options.server.service.tokenizer_files = &files;
  options.server.service.model_info = ModelInfo(context);
  options.server.service.limits = {.vocab_size = limits.vocab_size, .max_context = context};
  options.server.service.group_ready = [this] { return AllUp(); };
  ASSIGN_OR_RETURN(const auto leader, rpc::Leader::Start(std::move(options)));

  control_->address.Set(leader->address());
  slot_->phase.store(group::RankPhase::kServing, std::memory_order_release);
  return RunLeaderLoop(
      leader.get(),
      {.command_fd = arguments_.command_fd,
       .next_command = [fd = arguments_.command_fd]() -> std::optional<group::Command> {
         char byte = 0;
         if (::read(fd, &byte, 1) == 1) return static_cast<group::Command>(byte);
         return group::Command::kAbort;  // the supervisor is gone; the peer watch ends this process
       },
       .on_abort =
           [this] {
             communicator_->Abort();
             if (abort_gpu_) abort_gpu_();
           },
       .drain_timeout = options_.drain_timeout,
       .clock = &clock_});
}

rpc::TokenizerFiles Rank::ReadTokenizerFiles() const {
  rpc::TokenizerFiles::Files files;
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                           "config.json", "generation_config.json"}) {
    auto contents = model_.checkpoint->ReadFile(name, kTokenizerBytesMax);
    if (contents.ok()) {
      files.emplace_back(name, *std::move(contents));
    } else if (!absl::IsNotFound(contents.status())) {
      spdlog::warn("{}: {}", name, std::string(contents.status().message()));
    }
  }
  return rpc::TokenizerFiles(std::move(files));
}

v1::GetModelInfoResponse Rank::ModelInfo(int32_t context) const {
  const step::ExecutorLimits& limits = counted_executor_->limits();
  v1::GetModelInfoResponse info;
  info.set_model(options_.model_name);
  info.set_architecture(model_.checkpoint->spec().architecture);
  info.set_quantization(weights::LayoutName(model_.checkpoint->quantization().layout));
  info.set_context_length(static_cast<uint32_t>(context));
  info.set_vocab_size(static_cast<uint32_t>(limits.vocab_size));
  info.set_tensor_parallel(static_cast<uint32_t>(options_.tp));
  info.set_model_hash(absl::StrCat(absl::Hex(model_.checkpoint->IdentityHash(), absl::kZeroPad16)));
  info.set_max_sequences(static_cast<uint32_t>(limits.max_slots));
  info.set_kv_blocks(static_cast<uint32_t>(limits.kv_blocks));
  info.set_block_tokens(step::kBlockTokens);
  info.set_queue_size(static_cast<uint32_t>(options_.queue_size));
  for (const weights::RankMemoryPlan& plan : model_.plan.ranks) {
    v1::RankMemory* memory = info.add_memory();
    memory->set_rank(static_cast<uint32_t>(plan.share.rank));
    memory->set_weights_bytes(static_cast<uint64_t>(plan.weight_bytes));
    memory->set_kv_cache_bytes(static_cast<uint64_t>(plan.kv_block_bytes * model_.plan.kv_blocks));
    memory->set_activations_bytes(static_cast<uint64_t>(plan.activation_bytes));
    memory->set_workspace_bytes(static_cast<uint64_t>(plan.workspace_bytes));
    memory->set_graphs_bytes(static_cast<uint64_t>(plan.graph_bytes));
  }
  return info;
}

}  // namespace

int RunRank(const WorkerOptions& options, const RankArguments& arguments) {
  absl::Status status = group::StartPeerWatch(arguments.death_fd);
  if (status.ok()) {
    status = InitLogging({.level = options.log_level,
                          .format = options.log_format,
                          .process = arguments.rank == 0 ? std::string("leader")
                                                         : absl::StrCat("rank ", arguments.rank)});
  }
  auto control = group::SharedObject<group::GroupControl>::Attach(arguments.control_fd);
  auto stats = group::SharedObject<step::GroupStats>::Attach(arguments.stats_fd);
  if (!status.ok() || !control.ok() || !stats.ok()) return kExitConfiguration;

  const Failure failure = Rank(options, arguments, control->get(), stats->get()).Run();
  if (failure.ok()) return kExitDrained;
  group::SetExitReason(&(*control)->ranks[static_cast<size_t>(arguments.rank)], failure.exit_code,
                       std::string(failure.status.message()));
  return failure.exit_code;
}

}  // namespace nibble::worker
