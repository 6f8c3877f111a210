#include "worker/execution/cuda/gpu_bench.h"

#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "worker/collectives/self_communicator.h"
#include "worker/collectives/shm_communicator.h"
#include "worker/step/step_plan.h"

namespace nibble::execution {
namespace {

constexpr Duration kPeerPatience = std::chrono::minutes(2);

// One process of a group, all of which make the same plans.
class BenchRank {
 public:
  BenchRank(const GpuModelSource& source, const GpuBenchOptions& options, int32_t rank)
      : source_(source), options_(options), rank_(rank) {}

  absl::StatusOr<GpuBenchResult> Run(collectives::Communicator* communicator) {
    const auto begin = std::chrono::steady_clock::now();
    Say("loading");
    ASSIGN_OR_RETURN(result_.gpu, OpenGpu(rank_));
    ASSIGN_OR_RETURN(const weights::MemoryPlan plan, PlanGpuMemory(source_, options_.ranks,
                                                                   {.memory = Memory(),
                                                                    .fusion = options_.fusion,
                                                                    .gpu = &result_.gpu,
                                                                    .memory_fraction = 1}));
    ASSIGN_OR_RETURN(GpuExecutor made, CreateGpuExecutor(result_.gpu, source_, plan,
                                                         {.rank = rank_,
                                                          .fusion = options_.fusion,
                                                          .activations = options_.activations,
                                                          .communicator = communicator,
                                                          .echo = options_.one_rank,
                                                          .peer_patience = kPeerPatience}));
    result_.load_seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    result_.ranks = options_.ranks;
    result_.one_rank = options_.one_rank;
    result_.runs = options_.runs;
    result_.fusion = options_.fusion;
    result_.element = ElementOf(options_.activations, source_.shape());
    result_.slots = plan.options.max_slots;
    result_.positions = plan.kv_blocks * step::kBlockTokens;
    result_.max_step_tokens = plan.options.max_step_tokens;
    result_.memory = made.memory;
    result_.planned = plan.ranks[static_cast<size_t>(rank_)];
    RETURN_IF_ERROR(Measure(made.executor.get()));
    RETURN_IF_ERROR(TimeOperations(&made));
    return std::move(result_);
  }

 private:
  void Say(const std::string& what) const {
    if (rank_ == 0 && options_.progress) options_.progress(what);
  }

  // Of the decode steps whose operations are timed.
  [[nodiscard]] int32_t TimedDepth() const {
    return options_.decode_depths.empty() ? 1 : options_.decode_depths.front();
  }

  // Room for the largest run.
  [[nodiscard]] weights::MemoryOptions Memory() const {
    weights::MemoryOptions memory;
    memory.max_slots = 1;
    memory.max_step_tokens = options_.max_step_tokens;
    const auto take = [&memory](int32_t slots, int32_t positions) {
      memory.max_slots = std::max(memory.max_slots, slots);
      memory.max_context = std::max(memory.max_context, positions);
      memory.kv_blocks = std::max(memory.kv_blocks, BenchBlocks(slots, positions));
    };
    for (const int32_t length : options_.prefill_lengths) take(1, length);
    for (const int32_t length : options_.timed_prompts) take(1, length);
    for (const int32_t batch : options_.timed_batches) {
      take(batch, TimedDepth() + options_.decode_tokens + 2);
    }
    for (const int32_t depth : options_.decode_depths) {
      for (const int32_t batch : options_.decode_batches) {
        take(batch, depth + options_.decode_tokens + 2);
      }
    }
    return memory;
  }

  absl::Status Measure(step::Executor* executor) {
    Measurement measurement(executor, options_.runs);
    for (const int32_t length : options_.prefill_lengths) {
      Say(absl::StrCat("prefill of ", length));
      ASSIGN_OR_RETURN(const PrefillFigures figures, measurement.Prefill(length));
      result_.prefill.push_back(figures);
    }
    for (const int32_t depth : options_.decode_depths) {
      for (const int32_t batch : options_.decode_batches) {
        Say(absl::StrCat("decode, batch ", batch, " at depth ", depth));
        ASSIGN_OR_RETURN(const DecodeFigures figures,
                         measurement.Decode(batch, depth, options_.decode_tokens));
        result_.decode.push_back(figures);
      }
    }
    return absl::OkStatus();
  }

  absl::Status TimeOperations(GpuExecutor* made) {
    constexpr int32_t kSteps = 8;
    if (options_.timed_batches.empty() && options_.timed_prompts.empty()) return absl::OkStatus();
    ASSIGN_OR_RETURN(result_.read_bandwidth, GpuReadBandwidth(result_.gpu));
    Measurement measurement(made->executor.get(), 1);
    const int32_t depth = TimedDepth();
    for (const int32_t batch : options_.timed_batches) {
      Say(absl::StrCat("operations of a decode step, batch ", batch));
      ASSIGN_OR_RETURN(auto times, made->time_operations(batch, true, [&] {
        return measurement.Decode(batch, depth, kSteps).status();
      }));
      result_.operations.push_back(
          {.batch = batch, .prompt = depth, .operations = std::move(times)});
    }
    for (const int32_t length : options_.timed_prompts) {
      Say(absl::StrCat("operations of a prompt of ", length));
      ASSIGN_OR_RETURN(auto times, made->time_operations(length, false, [&] {
        return measurement.Prefill(length).status();
      }));
      result_.operations.push_back({.prompt = length, .operations = std::move(times)});
    }
    return absl::OkStatus();
  }

  const GpuModelSource& source_;
  const GpuBenchOptions& options_;
  const int32_t rank_;
  GpuBenchResult result_;
};

// The processes of ranks 1 and up; killed and reaped with their owner.
class Forks {
 public:
  ~Forks() {
    for (const pid_t pid : pids_) {
      ::kill(pid, SIGKILL);
      ::waitpid(pid, nullptr, 0);
    }
  }
  // True in the new process.
  absl::StatusOr<bool> Fork() {
    const pid_t parent = ::getpid();
    const pid_t pid = ::fork();
    if (pid < 0) return absl::ResourceExhaustedError("bench: no process can be started");
    if (pid > 0) {
      pids_.push_back(pid);
      return false;
    }
    pids_.clear();
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);
    return true;
  }

 private:
  std::vector<pid_t> pids_;
};

// Why the ranks that are forks ended, for the one that is not.
class Reasons {
 public:
  [[nodiscard]] static absl::StatusOr<Reasons> Create() {
    void* memory =
        ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return absl::ResourceExhaustedError("bench: no shared memory");
    return Reasons(static_cast<Shared*>(memory));
  }
  // In a fork; the first one's stays.
  void Set(const absl::Status& status) const {
    if (shared_->claimed.exchange(true)) return;
    const auto text = status.message();
    const size_t size = text.copy(shared_->text.data(), shared_->text.size() - 1);
    shared_->text[size] = '\0';
    shared_->code.store(static_cast<int>(status.code()), std::memory_order_release);
  }
  // The forks' where `own` only says that a peer was lost.
  [[nodiscard]] absl::Status Best(const absl::Status& own) const {
    const int code = shared_->code.load(std::memory_order_acquire);
    const bool peers = absl::IsAborted(own) || absl::IsDeadlineExceeded(own);
    if (!peers || code == 0) return own;
    return absl::Status(static_cast<absl::StatusCode>(code), shared_->text.data());
  }

 private:
  struct Shared {
    std::atomic<bool> claimed;
    std::atomic<int> code;
    std::array<char, 500> text;
  };
  explicit Reasons(Shared* shared) : shared_(shared) {}
  Shared* shared_;  // for the life of the processes
};

absl::StatusOr<GpuBenchResult> RunRank(const GpuModelSource& source, const GpuBenchOptions& options,
                                       int32_t rank, collectives::ShmRegion* region) {
  ASSIGN_OR_RETURN(const auto communicator,
                   collectives::MakeShmCommunicator(region, rank, {.timeout = kPeerPatience}));
  auto result = BenchRank(source, options, rank).Run(communicator.get());
  return result;
}

}  // namespace

absl::StatusOr<GpuBenchResult> RunGpuBench(const GpuModelSource& source,
                                           const GpuBenchOptions& options) {
  RETURN_IF_ERROR(CheckGpuBuild());
  if (options.one_rank && options.ranks == 1) {
    return absl::InvalidArgumentError("one rank's share needs a number of ranks that is not 1");
  }
  if (options.ranks == 1 || options.one_rank) {
    const auto alone = collectives::MakeSelfCommunicator();
    return BenchRank(source, options, 0).Run(alone.get());
  }
  ASSIGN_OR_RETURN(auto region, collectives::ShmRegion::Create(options.ranks));
  ASSIGN_OR_RETURN(const Reasons reasons, Reasons::Create());
  Forks forks;
  for (int32_t rank = 1; rank < options.ranks; ++rank) {
    ASSIGN_OR_RETURN(const bool child, forks.Fork());
    if (!child) continue;
    const auto result = RunRank(source, options, rank, &region);
    if (!result.ok()) {
      reasons.Set(result.status());
      region.Abort();  // after the reason: the others look for it when they are woken
    }
    ::_exit(result.ok() ? 0 : 1);
  }
  auto result = RunRank(source, options, 0, &region);
  if (!result.ok()) return reasons.Best(result.status());
  return result;
}

}  // namespace nibble::execution
