#include "worker/execution/cuda/gpu_group.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"
#include "kernels/cuda/w4_order.h"
#include "kernels/layout/gpu_x.h"

namespace nibble::execution {
namespace {

constexpr auto kNap = std::chrono::microseconds(20);

constexpr int32_t kProductTokens = 16;  // the decode kernel's
constexpr int32_t kSets = 2;
constexpr int32_t kOwnNumbers = 2;  // PeerExchange::failed, PeerSlices::ended

// A rank's exchange memory, which is one allocation: a handle stands for a whole one.
struct ExchangeLayout {
  ExchangeLayout(int32_t ranks, const ExchangeShape& shape)
      : product(cuda::ProductExchangeWords(kProductTokens, shape.columns)),
        norm(cuda::NormExchangeWords(cuda::kWgmmaPartsTokens, shape.columns)) {
    norms = kSets * ranks * product;
    parts = norms + kSets * ranks * norm;
    part = int64_t{cuda::SliceTokens(shape.step_tokens, ranks)} * shape.columns;
    normed = parts + Words(ranks * part * kRealBytes);
    const int64_t ordered =
        shape.step_tokens > 0 ? layout::GpuOrderedCount(shape.step_tokens, shape.columns) : 0;
    kept = normed + Words(ordered * kRealBytes);
    const int64_t floats = shape.step_tokens > 0 ? int64_t{cuda::kKeptRowsMax} * shape.columns : 0;
    flags = kept + Words(floats * static_cast<int64_t>(sizeof(float)));
    words = flags + Words(2 * cuda::kPeersMax * static_cast<int64_t>(sizeof(uint32_t)));
  }
  static constexpr int64_t kRealBytes = sizeof(cuda::Real16);
  static int64_t Words(int64_t bytes) {
    constexpr auto kBytes = static_cast<int64_t>(sizeof(uint4));
    return (bytes + kBytes - 1) / kBytes;
  }

  int64_t product, norm;                      // words of one sender and set
  int64_t part;                               // numbers of one sender's part of a slice
  int64_t norms, parts, normed, kept, flags;  // where they begin; products do at 0
  int64_t words;                              // in all
};

// What a rank tells the others of its words.
struct PeerHandle {
  cudaIpcMemHandle_t words;
};

template <typename T>
absl::Status Gather(collectives::Communicator* host, const T& mine, std::vector<T>* all) {
  all->resize(static_cast<size_t>(host->size()));
  return host->AllGather(std::as_bytes(std::span(&mine, 1)),
                         std::as_writable_bytes(std::span(*all)));
}

}  // namespace

int64_t GpuGroup::ExchangeBytes(int32_t ranks, const ExchangeShape& shape) {
  DeviceArena counted(DeviceArena::Mode::kCount);
  static_cast<void>(counted.Allocate<uint4>(ExchangeLayout(ranks, shape).words));
  static_cast<void>(counted.Allocate<uint32_t>(2 * cuda::kExchangeBlocksMax));
  static_cast<void>(counted.Allocate<uint32_t>(kOwnNumbers));
  return counted.bytes();
}

absl::StatusOr<std::unique_ptr<GpuGroup>> GpuGroup::Join(const GpuGroupOptions& options) {
  std::unique_ptr<GpuGroup> group(
      new GpuGroup(options.host->rank(), options.host->size(), options.patience));
  RETURN_IF_ERROR(group->StartNccl(options.host));
  RETURN_IF_ERROR(group->OpenPeers(options));
  return group;
}

absl::StatusOr<std::unique_ptr<GpuGroup>> GpuGroup::Echo(int32_t rank, int32_t ranks,
                                                         const ExchangeShape& shape,
                                                         Duration patience) {
  if (ranks > cuda::kPeersMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("one rank's share of ", ranks, " is measured for at most ", cuda::kPeersMax));
  }
  std::unique_ptr<GpuGroup> group(new GpuGroup(rank, ranks, patience));
  RETURN_IF_ERROR(group->MakeExchange(shape).status());
  // A peer's memory lies so that this rank's place in it is the peer's place in its own.
  cuda::PeerExchange& exchange = *group->exchange_;
  cuda::PeerSlices& slices = group->slices_;
  const int64_t part = ExchangeLayout(ranks, shape).part;
  for (int32_t peer = 0; peer < ranks; ++peer) {
    exchange.products[peer] = exchange.products[rank] + (peer - rank) * exchange.product_words;
    exchange.norms[peer] = exchange.norms[rank] + (peer - rank) * exchange.norm_words;
    slices.parts[peer] = slices.parts[rank] + (peer - rank) * part;
    slices.normed[peer] = slices.normed[rank];
    slices.kept[peer] = slices.kept[rank];
    slices.flags[peer] = slices.flags[rank] + (peer - rank);
  }
  group->echo_ = true;
  return group;
}

absl::StatusOr<std::vector<std::unique_ptr<GpuGroup>>> GpuGroup::ShareGpu(
    int32_t ranks, const ExchangeShape& shape, Duration patience) {
  CHECK(ranks >= 1 && ranks <= cuda::kPeersMax);
  std::vector<std::unique_ptr<GpuGroup>> groups;
  std::vector<uint4*> begins;
  for (int32_t rank = 0; rank < ranks; ++rank) {
    groups.push_back(std::unique_ptr<GpuGroup>(new GpuGroup(rank, ranks, patience)));
    ASSIGN_OR_RETURN(uint4 * begin, groups.back()->MakeExchange(shape));
    begins.push_back(begin);
  }
  for (const auto& group : groups) {
    for (int32_t peer = 0; peer < ranks; ++peer) {
      group->Place(shape, peer, begins[static_cast<size_t>(peer)]);
    }
  }
  return groups;
}

GpuGroup::~GpuGroup() {
  if (exchange_.has_value() && communicator_ != nullptr) {
    for (int32_t peer = 0; peer < ranks_; ++peer) {
      if (peer == rank_ || exchange_->products[peer] == nullptr) continue;
      static_cast<void>(cudaIpcCloseMemHandle(exchange_->products[peer]));
    }
  }
  // Not finalized first: that waits for peers, which may be gone.
  if (communicator_ != nullptr) static_cast<void>(nccl_->abort(communicator_));
}

absl::Status GpuGroup::StartNccl(collectives::Communicator* host) {
  // Multicast across GPUs can take a host's NVLink fabric out of service: an operator's choice.
  ::setenv("NCCL_NVLS_ENABLE", "0", /*overwrite=*/0);
  ASSIGN_OR_RETURN(nccl_, NcclLibrary::Open());
  NcclId id{};
  if (rank_ == 0) {
    const int result = nccl_->get_unique_id(&id);
    if (result != kNcclSuccess) {
      return absl::InternalError(absl::StrCat("NCCL: ", nccl_->get_error_string(result)));
    }
  }
  RETURN_IF_ERROR(host->Broadcast(std::as_writable_bytes(std::span(id.bytes)), 0));
  NcclConfig config;
  return Finish(nccl_->init_rank_config(&communicator_, ranks_, id, rank_, &config),
                "joining the group");
}

absl::Status GpuGroup::Finish(int result, const char* what) {
  const auto until = std::chrono::steady_clock::now() + patience_;
  while (result == kNcclInProgress) {
    const int asked = nccl_->get_async_error(communicator_, &result);
    if (asked != kNcclSuccess) result = asked;
    if (result != kNcclInProgress) break;
    if (std::chrono::steady_clock::now() > until) {
      return absl::DeadlineExceededError(
          absl::StrCat("NCCL, ", what, ": rank ", rank_, " waited for a peer for too long"));
    }
    std::this_thread::sleep_for(kNap);
  }
  if (result == kNcclSuccess) return absl::OkStatus();
  return absl::AbortedError(
      absl::StrCat("NCCL, ", what, ": ", nccl_->get_error_string(result), " (rank ", rank_, ")"));
}

absl::StatusOr<bool> GpuGroup::AllCanReachEachOther(collectives::Communicator* host) const {
  int device = 0;
  RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&device), "asking for the device"));
  int32_t reaches = ranks_ <= cuda::kPeersMax ? 1 : 0;
  for (int32_t peer = 0; reaches != 0 && peer < ranks_; ++peer) {
    int can = 1;
    if (peer != device && cudaDeviceCanAccessPeer(&can, device, peer) != cudaSuccess) can = 0;
    reaches = can;
  }
  static_cast<void>(cudaGetLastError());
  std::vector<int32_t> all;
  RETURN_IF_ERROR(Gather(host, reaches, &all));
  for (const int32_t each : all) {
    if (each == 0) return false;
  }
  return true;
}

void GpuGroup::Place(const ExchangeShape& shape, int32_t rank, uint4* begin) {
  const ExchangeLayout layout(ranks_, shape);
  exchange_->products[rank] = begin;
  exchange_->norms[rank] = begin + layout.norms;
  slices_.parts[rank] = reinterpret_cast<cuda::Real16*>(begin + layout.parts);
  slices_.normed[rank] = reinterpret_cast<cuda::Real16*>(begin + layout.normed);
  slices_.kept[rank] = reinterpret_cast<float*>(begin + layout.kept);
  slices_.flags[rank] = reinterpret_cast<uint32_t*>(begin + layout.flags);
}

absl::StatusOr<uint4*> GpuGroup::MakeExchange(const ExchangeShape& shape) {
  const ExchangeLayout layout(ranks_, shape);
  ASSIGN_OR_RETURN(uint4 * begin, arena_.Allocate<uint4>(layout.words));
  ASSIGN_OR_RETURN(uint32_t * epochs, arena_.Allocate<uint32_t>(2 * cuda::kExchangeBlocksMax));
  ASSIGN_OR_RETURN(uint32_t * numbers, arena_.Allocate<uint32_t>(kOwnNumbers));
  ASSIGN_OR_RETURN(words_, PinnedMemory::Allocate(2 * sizeof(uint32_t)));
  std::memset(words_.as<uint32_t>(), 0, 2 * sizeof(uint32_t));
  exchange_ = {.rank = rank_,
               .ranks = ranks_,
               .product_words = layout.product,
               .norm_words = layout.norm,
               .epochs = epochs,
               .abort_word = words_.as<uint32_t>(),
               .fault = words_.as<uint32_t>() + 1,
               .failed = numbers,
               .limit_ns = static_cast<uint64_t>(patience_.count())};
  slices_ = {.max_tokens = shape.step_tokens, .ended = numbers + 1};
  Place(shape, rank_, begin);
  RETURN_IF_ERROR(
      CudaStatus(cudaMemset(exchange_->norms[rank_], 0xff,
                            static_cast<size_t>(layout.parts - layout.norms) * sizeof(uint4)),
                 "preparing exchange memory"));
  // The words are as they begin before any peer can write to them.
  RETURN_IF_ERROR(CudaStatus(cudaDeviceSynchronize(), "clearing exchange memory"));
  return begin;
}

absl::Status GpuGroup::OpenPeers(const GpuGroupOptions& options) {
  if (!options.one_machine) return absl::OkStatus();
  ASSIGN_OR_RETURN(const bool reach, AllCanReachEachOther(options.host));
  if (!reach || options.exchange.columns == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(uint4* const own, MakeExchange(options.exchange));
  PeerHandle mine{};
  std::vector<PeerHandle> all;
  absl::Status status =
      CudaStatus(cudaIpcGetMemHandle(&mine.words, own), "sharing exchange memory");
  if (status.ok()) status = Gather(options.host, mine, &all);
  for (int32_t peer = 0; status.ok() && peer < ranks_; ++peer) {
    if (peer == rank_) continue;
    void* mapped = nullptr;
    status = CudaStatus(cudaIpcOpenMemHandle(&mapped, all[static_cast<size_t>(peer)].words,
                                             cudaIpcMemLazyEnablePeerAccess),
                        absl::StrCat("mapping the exchange memory of rank ", peer));
    if (status.ok()) Place(options.exchange, peer, static_cast<uint4*>(mapped));
  }
  return status;
}

absl::Status GpuGroup::AllReduce(void* data, int64_t count, NcclType type, cudaStream_t stream) {
  if (echo_) return absl::OkStatus();
  if (communicator_ == nullptr) return absl::UnimplementedError("a sum by NCCL on one GPU");
  return Finish(nccl_->all_reduce(data, data, static_cast<size_t>(count), type, kNcclSum,
                                  communicator_, stream),
                "summing");
}

absl::Status GpuGroup::AllGather(const float* mine, float* all, int64_t count,
                                 cudaStream_t stream) {
  if (communicator_ == nullptr) {
    return CudaStatus(
        cudaMemcpyAsync(all + rank_ * count, mine, static_cast<size_t>(count) * sizeof(float),
                        cudaMemcpyDeviceToDevice, stream),
        "copying this rank's part");
  }
  return Finish(
      nccl_->all_gather(mine, all, static_cast<size_t>(count), kNcclFloat, communicator_, stream),
      "gathering");
}

absl::Status GpuGroup::Poll() {
  if (exchange_.has_value() && *exchange_->fault != 0) {
    const bool late = *exchange_->fault == static_cast<uint32_t>(cuda::ExchangeFault::kTimeout);
    return absl::AbortedError(absl::StrCat(
        "rank ", rank_, late ? " waited for a peer for too long" : " was told to end"));
  }
  if (communicator_ == nullptr) return absl::OkStatus();
  int result = kNcclSuccess;
  const int asked = nccl_->get_async_error(communicator_, &result);
  if (asked != kNcclSuccess) result = asked;
  if (result == kNcclSuccess || result == kNcclInProgress) return absl::OkStatus();
  return absl::AbortedError(
      absl::StrCat("NCCL: ", nccl_->get_error_string(result), " (rank ", rank_, ")"));
}

void GpuGroup::Abort() {
  if (exchange_.has_value()) *static_cast<volatile uint32_t*>(words_.as<uint32_t>()) = 1;
}

}  // namespace nibble::execution
