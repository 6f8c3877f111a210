#include "worker/execution/cuda/gpu_rank.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/units.h"
#include "kernels/cuda/peer_exchange.h"
#include "kernels/cuda/probe.h"
#include "worker/execution/cuda/cuda_decoder.h"
#include "worker/execution/cuda/cuda_executor.h"
#include "worker/execution/cuda/cuda_model.h"
#include "worker/execution/cuda/decode_graphs.h"
#include "worker/execution/cuda/launch_timer.h"

namespace nibble::execution {
namespace {

// Measured with driver 580.159, CUDA 13.0 and, between two GPUs, NCCL 2.28.9: what NCCL holds, what
// the driver holds beside graphs, and a kernel's place in a graph.
constexpr int64_t kNcclBytes = int64_t{890} << 20;
constexpr int64_t kLibraryBytes = int64_t{5} << 20;
constexpr int64_t kGraphNodeBytes = 3072;
constexpr int64_t kKernelsALayer = 5;
constexpr int64_t kBlockCopyBytes = 8;  // a step may copy every block once

absl::Status NoGpu(const std::string& message) { return absl::FailedPreconditionError(message); }

std::string VersionText(int version) {
  return absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

std::string VisibleDevices() {
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  return visible == nullptr ? "" : absl::StrCat(" (CUDA_VISIBLE_DEVICES=", visible, ")");
}

absl::Status CheckDriver(int32_t ordinal) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  int driver = 0;
  static_cast<void>(cudaDriverGetVersion(&driver));
  if (driver == 0) return NoGpu("no NVIDIA driver on this machine (libcuda.so.1 is missing)");
  if (error == cudaErrorInsufficientDriver) {
    return NoGpu(absl::StrCat("the NVIDIA driver supports CUDA ", VersionText(driver),
                              "; this build needs ", VersionText(CUDART_VERSION)));
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    return NoGpu(absl::StrCat("the NVIDIA driver shows no GPU", VisibleDevices()));
  }
  RETURN_IF_ERROR(CudaStatus(error, "counting GPUs"));
  if (ordinal < count) return absl::OkStatus();
  return NoGpu(absl::StrCat("rank ", ordinal, " needs a GPU of its own; this machine shows ", count,
                            VisibleDevices()));
}

// One kernel tells whether there is code for this GPU.
absl::Status CheckArchitecture(const GpuInfo& info) {
  const cudaError_t error = cuda::ProbeKernels();
  if (error == cudaSuccess) return absl::OkStatus();
  static_cast<void>(cudaGetLastError());
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    return NoGpu(absl::StrCat("GPU ", info.ordinal, " (", info.name, ") has compute capability ",
                              info.compute_capability, "; this build has kernels for ",
                              NIBBLE_CUDA_ARCHITECTURES));
  }
  return CudaStatus(error, absl::StrCat("GPU ", info.ordinal));
}

int64_t GraphBytes(const model::ModelSpec& spec, const weights::MemoryOptions& memory,
                   bool fusion) {
  if (!fusion) return kLibraryBytes;
  const auto batches = static_cast<int64_t>(DecodeGraphBatches(memory.max_slots).size());
  return kLibraryBytes + batches * (spec.layer_count * kKernelsALayer + 3) * kGraphNodeBytes;
}

absl::StatusOr<std::vector<weights::RankShare>> SharesOf(const GpuModelSource& source,
                                                         int32_t ranks) {
  if (source.checkpoint != nullptr) return weights::PlanShares(*source.checkpoint, ranks);
  return weights::ComputeShares(source.spec, ranks, source.group);
}

absl::StatusOr<ModelFormats> FormatsOf(const GpuModelSource& source,
                                       const weights::RankShare& share) {
  if (source.checkpoint != nullptr) return DescribeFormats(*source.checkpoint, share);
  return RandomFormats(source.spec, share, source.group);
}

std::vector<weights::Range> VocabShares(const std::vector<weights::RankShare>& shares) {
  std::vector<weights::Range> ranges;
  for (const weights::RankShare& share : shares) ranges.push_back(share.vocab);
  return ranges;
}

CudaExecutorOptions OptionsOf(const weights::MemoryPlan& plan, bool fusion, bool one_machine,
                              const std::vector<weights::RankShare>& shares) {
  return {.max_slots = plan.options.max_slots,
          .max_step_tokens = plan.options.max_step_tokens,
          .kv_blocks = plan.kv_blocks,
          .fusion = fusion,
          .one_machine = one_machine,
          .vocab_shares = VocabShares(shares),
          .on_exchanged_bytes = {}};
}

absl::StatusOr<weights::RankMemoryPlan> PlanRank(const GpuModelSource& source,
                                                 const std::vector<weights::RankShare>& shares,
                                                 const weights::RankShare& share,
                                                 const weights::MemoryPlan& plan,
                                                 const GpuPlanOptions& options) {
  ASSIGN_OR_RETURN(const ModelFormats formats, FormatsOf(source, share));
  ASSIGN_OR_RETURN(auto model, CudaModel::Plan(source.shape(), share, formats, plan.max_context));
  CudaExecutorOptions executor = OptionsOf(plan, options.fusion, options.one_machine, shares);
  executor.kv_blocks = 0;  // leaves the block that serves padding
  ASSIGN_OR_RETURN(const DeviceMemoryUse use, CudaExecutor::Plan(std::move(model), executor));
  weights::RankMemoryPlan rank;
  rank.share = share;
  rank.weight_bytes = use.weights;
  rank.kv_block_bytes = use.kv_cache;
  rank.activation_bytes = use.activations;
  rank.workspace_bytes = use.workspace + use.kv_cache;
  rank.graph_bytes = GraphBytes(source.shape(), options.memory, options.fusion);
  if (share.rank_count > 1) rank.graph_bytes += kNcclBytes;
  return rank;
}

absl::StatusOr<int32_t> RankBlocks(const weights::RankMemoryPlan& rank,
                                   const GpuPlanOptions& options, int32_t max_context) {
  weights::MemoryOptions memory = options.memory;
  std::string budget;
  if (memory.memory_bytes == 0 && options.gpu != nullptr) {
    memory.memory_bytes = static_cast<int64_t>(static_cast<double>(options.gpu->free_bytes) *
                                               options.memory_fraction);
    budget =
        absl::StrCat(" (", static_cast<int>(options.memory_fraction * 100 + 0.5),
                     " % of what is free on GPU ", options.gpu->ordinal, ", ", options.gpu->name,
                     ", which has ", FormatBytes(options.gpu->total_bytes), ")");
  }
  const auto blocks = weights::KvBlocksWithin(rank, memory, max_context);
  if (!blocks.ok()) {
    return absl::Status(blocks.status().code(), absl::StrCat(blocks.status().message(), budget));
  }
  const int64_t useful = int64_t{memory.max_slots} * weights::SequenceBlocks(max_context);
  if (memory.kv_blocks > 0) return *blocks;
  return static_cast<int32_t>(std::min<int64_t>(*blocks, useful));
}

absl::StatusOr<std::unique_ptr<CudaModel>> MakeModel(const GpuModelSource& source,
                                                     const weights::RankMemoryPlan& rank,
                                                     const weights::MemoryPlan& plan,
                                                     const GpuExecutorOptions& options) {
  const cuda::Element element = ElementOf(options.activations, source.shape());
  if (source.checkpoint == nullptr) {
    return CudaModel::Random(source.spec, rank.share, source.group, plan.max_context, element);
  }
  return CudaModel::Load(*source.checkpoint, rank.share, plan.max_context, element,
                         [&](int64_t done) {
                           if (options.progress) options.progress(done, rank.weight_bytes);
                         });
}

absl::StatusOr<int64_t> FreeBytes() {
  size_t free = 0, total = 0;
  RETURN_IF_ERROR(CudaStatus(cudaMemGetInfo(&free, &total), "asking for free memory"));
  return static_cast<int64_t>(free);
}

}  // namespace

absl::StatusOr<double> GpuReadBandwidth(const GpuInfo& gpu) {
  constexpr int kRuns = 5;
  constexpr int64_t kLargest = int64_t{4} << 30;
  ASSIGN_OR_RETURN(const int64_t free, FreeBytes());
  const int64_t bytes = std::min(kLargest, free / 2) / 256 * 256;
  DeviceArena arena;
  ASSIGN_OR_RETURN(const uint8_t* data, arena.Allocate<uint8_t>(bytes));
  ASSIGN_OR_RETURN(uint32_t * sink, arena.Allocate<uint32_t>(1));
  LaunchTimer timer(nullptr);
  for (int run = 0; run < kRuns; ++run) {
    RETURN_IF_ERROR(timer.BeginStep());
    RETURN_IF_ERROR(CudaStatus(cuda::ReadMemory(data, bytes, sink, gpu.multiprocessors, nullptr),
                               "reading memory"));
    RETURN_IF_ERROR(timer.Mark("read", bytes, 0));
  }
  ASSIGN_OR_RETURN(const std::vector<OperationTime> times, timer.Times());
  return static_cast<double>(bytes) / (times.front().microseconds * 1e-6);
}

absl::Status CheckGpuBuild() { return absl::OkStatus(); }

absl::StatusOr<GpuInfo> OpenGpu(int32_t ordinal) {
  RETURN_IF_ERROR(CheckDriver(ordinal));
  cudaDeviceProp properties{};
  RETURN_IF_ERROR(CudaStatus(cudaGetDeviceProperties(&properties, ordinal), "asking for the GPU"));
  GpuInfo info{.ordinal = ordinal,
               .name = properties.name,
               .compute_capability = absl::StrCat(properties.major, ".", properties.minor),
               .driver = {},
               .multiprocessors = properties.multiProcessorCount};
  int driver = 0;
  RETURN_IF_ERROR(CudaStatus(cudaDriverGetVersion(&driver), "asking for the driver"));
  info.driver = VersionText(driver);
  cudaError_t error = cudaSetDevice(ordinal);
  if (error == cudaSuccess) error = cudaFree(nullptr);  // makes the context
  if (error == cudaErrorDevicesUnavailable) {
    return NoGpu(absl::StrCat("GPU ", ordinal, " (", info.name,
                              ") is held by another process for itself alone"));
  }
  if (error == cudaErrorMemoryAllocation) {
    return absl::ResourceExhaustedError(
        absl::StrCat("GPU ", ordinal, " (", info.name,
                     ") has no memory left for a context: other processes hold it"));
  }
  RETURN_IF_ERROR(CudaStatus(error, absl::StrCat("opening GPU ", ordinal)));
  RETURN_IF_ERROR(CheckArchitecture(info));
  info.total_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  ASSIGN_OR_RETURN(info.free_bytes, FreeBytes());
  return info;
}

absl::StatusOr<weights::MemoryPlan> PlanGpuMemory(const GpuModelSource& source, int32_t rank_count,
                                                  const GpuPlanOptions& options) {
  const model::ModelSpec& spec = source.shape();
  RETURN_IF_ERROR(weights::CheckMemoryOptions(spec, options.memory));
  if (rank_count > cuda::kPeersMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("tp is ", rank_count, "; a group of GPUs has at most ", cuda::kPeersMax));
  }
  weights::MemoryPlan plan;
  plan.options = options.memory;
  plan.max_context = options.memory.max_context > 0 ? options.memory.max_context : spec.max_context;
  ASSIGN_OR_RETURN(const auto shares, SharesOf(source, rank_count));
  for (const weights::RankShare& share : shares) {
    ASSIGN_OR_RETURN(weights::RankMemoryPlan rank, PlanRank(source, shares, share, plan, options));
    ASSIGN_OR_RETURN(rank.kv_blocks, RankBlocks(rank, options, plan.max_context));
    plan.kv_blocks = plan.ranks.empty() ? rank.kv_blocks : std::min(plan.kv_blocks, rank.kv_blocks);
    plan.ranks.push_back(rank);
  }
  for (weights::RankMemoryPlan& rank : plan.ranks) {
    rank.kv_blocks = plan.kv_blocks;
    rank.workspace_bytes += kBlockCopyBytes * plan.kv_blocks;
  }
  return plan;
}

absl::StatusOr<GpuExecutor> CreateGpuExecutor(const GpuInfo& gpu, const GpuModelSource& source,
                                              const weights::MemoryPlan& plan,
                                              const GpuExecutorOptions& options) {
  const weights::RankMemoryPlan& rank = plan.ranks[static_cast<size_t>(options.rank)];
  ASSIGN_OR_RETURN(auto model, MakeModel(source, rank, plan, options));
  std::vector<weights::RankShare> shares;
  for (const weights::RankMemoryPlan& each : plan.ranks) shares.push_back(each.share);
  std::unique_ptr<GpuGroup> group;
  const int32_t exchange_columns = source.shape().hidden_size;
  if (shares.size() > 1 && options.echo) {
    ASSIGN_OR_RETURN(group, GpuGroup::Echo(options.rank, static_cast<int32_t>(shares.size()),
                                           exchange_columns, options.peer_patience));
  } else if (shares.size() > 1) {
    ASSIGN_OR_RETURN(group, GpuGroup::Join({.host = options.communicator,
                                            .exchange_columns = exchange_columns,
                                            .one_machine = options.one_machine,
                                            .patience = options.peer_patience}));
  }
  CudaExecutorOptions executor_options =
      OptionsOf(plan, options.fusion, options.one_machine, shares);
  executor_options.on_exchanged_bytes = options.on_exchanged_bytes;
  ASSIGN_OR_RETURN(auto executor,
                   CudaExecutor::Create(std::move(model), executor_options, std::move(group)));
  const DeviceMemoryUse use = executor->memory_use();
  GpuExecutor made;
  made.memory = {.weights = use.weights,
                 .kv_cache = use.kv_cache - rank.kv_block_bytes,
                 .activations = use.activations,
                 .workspace = use.workspace + rank.kv_block_bytes,
                 .context = gpu.total_bytes - gpu.free_bytes};
  ASSIGN_OR_RETURN(const int64_t free, FreeBytes());
  made.memory.graphs = std::max<int64_t>(
      0, gpu.free_bytes - free - use.weights - use.kv_cache - use.activations - use.workspace);
  made.abort = [target = executor.get()] { target->Abort(); };
  made.time_operations = [target = executor.get()](int32_t tokens, bool decode,
                                                   const std::function<absl::Status()>& steps) {
    return target->TimeOperations(tokens, decode, steps);
  };
  made.executor = std::move(executor);
  return made;
}

}  // namespace nibble::execution
