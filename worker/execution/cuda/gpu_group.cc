#include "worker/execution/cuda/gpu_group.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "kernels/cuda/w4_order.h"

namespace nibble::execution {
namespace {

constexpr auto kNap = std::chrono::microseconds(20);

constexpr int32_t kProductTokens = 16;  // the decode kernel's
constexpr int32_t kSets = 2;

// Words of both kinds of a rank's exchange memory, which is one allocation: a handle stands for a
// whole one.
struct ExchangeWords {
  ExchangeWords(int32_t ranks, int32_t columns)
      : product(cuda::ProductExchangeWords(kProductTokens, columns)),
        norm(cuda::NormExchangeWords(cuda::kWgmmaPartsTokens, columns)),
        products(kSets * ranks * product),
        norms(kSets * ranks * norm) {}
  int64_t product, norm;    // of one sender and set
  int64_t products, norms;  // in all
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

int64_t GpuGroup::ExchangeBytes(int32_t ranks, int32_t exchange_columns) {
  const ExchangeWords words(ranks, exchange_columns);
  DeviceArena counted(DeviceArena::Mode::kCount);
  static_cast<void>(counted.Allocate<uint4>(words.products + words.norms));
  static_cast<void>(counted.Allocate<uint32_t>(2 * cuda::kExchangeBlocksMax));
  static_cast<void>(counted.Allocate<uint32_t>(1));
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
                                                         int32_t exchange_columns,
                                                         Duration patience) {
  if (ranks > cuda::kPeersMax) {
    return absl::InvalidArgumentError(
        absl::StrCat("one rank's share of ", ranks, " is measured for at most ", cuda::kPeersMax));
  }
  std::unique_ptr<GpuGroup> group(new GpuGroup(rank, ranks, patience));
  ASSIGN_OR_RETURN(cuda::PeerExchange exchange, group->MakeExchange(exchange_columns));
  // A peer's words lie so that this rank's place among them is the peer's place among its own.
  for (int32_t peer = 0; peer < ranks; ++peer) {
    exchange.products[peer] = exchange.products[rank] + (peer - rank) * exchange.product_words;
    exchange.norms[peer] = exchange.norms[rank] + (peer - rank) * exchange.norm_words;
  }
  group->exchange_ = exchange;
  return group;
}

GpuGroup::~GpuGroup() {
  if (exchange_.has_value() && communicator_ != nullptr) {
    for (int32_t peer = 0; peer < ranks_; ++peer) {
      if (peer != rank_) static_cast<void>(cudaIpcCloseMemHandle(exchange_->products[peer]));
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

absl::StatusOr<cuda::PeerExchange> GpuGroup::MakeExchange(int32_t columns) {
  const ExchangeWords words(ranks_, columns);
  cuda::PeerExchange exchange{
      .rank = rank_, .ranks = ranks_, .product_words = words.product, .norm_words = words.norm};
  ASSIGN_OR_RETURN(uint4 * own, arena_.Allocate<uint4>(words.products + words.norms));
  exchange.products[rank_] = own;
  exchange.norms[rank_] = own + words.products;
  RETURN_IF_ERROR(CudaStatus(
      cudaMemset(exchange.norms[rank_], 0xff, static_cast<size_t>(words.norms) * sizeof(uint4)),
      "preparing exchange memory"));
  ASSIGN_OR_RETURN(exchange.epochs, arena_.Allocate<uint32_t>(2 * cuda::kExchangeBlocksMax));
  ASSIGN_OR_RETURN(exchange.failed, arena_.Allocate<uint32_t>(1));
  ASSIGN_OR_RETURN(words_, PinnedMemory::Allocate(2 * sizeof(uint32_t)));
  std::memset(words_.as<uint32_t>(), 0, 2 * sizeof(uint32_t));
  exchange.abort_word = words_.as<uint32_t>();
  exchange.fault = words_.as<uint32_t>() + 1;
  exchange.limit_ns = static_cast<uint64_t>(patience_.count());
  // The words are as they begin before any peer can write to them.
  RETURN_IF_ERROR(CudaStatus(cudaDeviceSynchronize(), "clearing exchange memory"));
  return exchange;
}

absl::Status GpuGroup::OpenPeers(const GpuGroupOptions& options) {
  if (!options.one_machine) return absl::OkStatus();
  ASSIGN_OR_RETURN(const bool reach, AllCanReachEachOther(options.host));
  if (!reach || options.exchange_columns == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(cuda::PeerExchange exchange, MakeExchange(options.exchange_columns));
  uint4* const own = exchange.products[rank_];
  PeerHandle mine{};
  RETURN_IF_ERROR(CudaStatus(cudaIpcGetMemHandle(&mine.words, own), "sharing exchange memory"));
  std::vector<PeerHandle> all;
  RETURN_IF_ERROR(Gather(options.host, mine, &all));
  for (int32_t peer = 0; peer < ranks_; ++peer) {
    void* mapped = own;
    if (peer != rank_) {
      RETURN_IF_ERROR(CudaStatus(cudaIpcOpenMemHandle(&mapped, all[static_cast<size_t>(peer)].words,
                                                      cudaIpcMemLazyEnablePeerAccess),
                                 absl::StrCat("mapping the exchange memory of rank ", peer)));
    }
    exchange.products[peer] = static_cast<uint4*>(mapped);
    exchange.norms[peer] =
        exchange.products[peer] + (exchange.norms[rank_] - exchange.products[rank_]);
  }
  exchange_ = exchange;
  return absl::OkStatus();
}

absl::Status GpuGroup::AllReduce(void* data, int64_t count, NcclType type, cudaStream_t stream) {
  if (communicator_ == nullptr) return absl::OkStatus();
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
