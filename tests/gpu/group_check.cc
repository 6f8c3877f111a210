// Holds the sums over GPUs to plain ones, times them, and sees waits for a lost peer end.
//
//   group_check [RANKS]              one GPU a rank; 2 unless given
//   group_check --one-gpu [RANKS]    without NCCL's, every rank on a stream of one GPU
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/check.h"
#include "kernels/cuda/nccl_results.h"
#include "tests/gpu/comparison.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/graph_timer.h"
#include "tests/gpu/group_sums.h"
#include "tests/support/must.h"
#include "worker/collectives/shm_communicator.h"
#include "worker/execution/cuda/gpu_group.h"

namespace nibble::gpu_check {
namespace {

using execution::GpuGroup;
using testing::Must;

// One case on a GPU of its own for each rank; every process makes the other ranks' parts itself.
bool CheckSum(const GpuGroup& group, const SumCase& c, cudaStream_t stream) {
  cuda::Tested() = c.element;
  const Sum sum(group.rank(), c);
  std::vector<std::vector<float>> parts;
  for (int32_t rank = 0; rank < group.ranks(); ++rank) parts.push_back(Sum(rank, c).Part());
  for (int round = 0; round < kRounds; ++round) sum.Launch(*group.exchange(), stream);
  CUDA_OK(cudaStreamSynchronize(stream));
  return SumHolds(sum, group.rank(), parts);
}

// Through NCCL, and the head's shares, of different sizes, joined.
bool CheckLarge(GpuGroup* group, cudaStream_t stream) {
  constexpr size_t kCount = 1 << 20;
  DeviceArray<float> data(Normal(kCount, 100 + static_cast<uint32_t>(group->rank())));
  Must(group->AllReduce(data.get(), kCount, execution::kNcclFloat, stream));
  constexpr int32_t kRows = 3, kShare = 48;
  const int32_t ranks = group->ranks();
  const int32_t own = kShare - 16 * (group->rank() % 2);
  DeviceArray<float> mine(
      std::vector<float>(kRows * kShare, 1.0f + static_cast<float>(group->rank())));
  DeviceArray<float> gathered(static_cast<size_t>(ranks * kRows * kShare));
  Must(group->AllGather(mine.get(), gathered.get(), kRows * kShare, stream));
  cuda::JoinLogitsParams join{
      .gathered = gathered.get(), .rank_stride = kRows * kShare, .ranks = ranks, .rows = kRows};
  for (int32_t rank = 0; rank < ranks; ++rank) {
    join.begin[rank + 1] = join.begin[rank] + kShare - 16 * (rank % 2);
  }
  const int32_t vocab = join.begin[ranks];
  DeviceArray<float> logits(static_cast<size_t>(kRows * vocab));
  join.logits = logits.get();
  CUDA_OK(cuda::JoinLogits(join, {.stream = stream}));
  CUDA_OK(cudaStreamSynchronize(stream));
  double worst = 0;
  std::vector<float> want(kCount, 0.0f);
  for (int32_t rank = 0; rank < ranks; ++rank) {
    const auto part = Normal(kCount, 100 + static_cast<uint32_t>(rank));
    for (size_t i = 0; i < kCount; ++i) want[i] += part[i];
  }
  const auto got = data.Get();
  for (size_t i = 0; i < kCount; ++i) {
    worst = std::max(worst, std::abs(static_cast<double>(got[i] - want[i])));
  }
  size_t misplaced = 0;
  const auto joined = logits.Get();
  for (int32_t i = 0; i < kRows * vocab; ++i) {
    int32_t rank = 0;
    while (i % vocab >= join.begin[rank + 1]) ++rank;
    if (joined[static_cast<size_t>(i)] != 1.0f + static_cast<float>(rank)) ++misplaced;
  }
  const bool ok = worst < 1e-5 && misplaced == 0 && own > 0;
  std::printf("%s rank %d: NCCL sum off by %.1e, %zu logits misplaced\n", ok ? "ok  " : "FAIL",
              group->rank(), worst, misplaced);
  return ok;
}

template <typename Launch>
double MicrosecondsEach(cudaStream_t stream, const Launch& launch) {
  constexpr int kLaunches = 200;
  const auto launches = [&] {
    for (int i = 0; i < kLaunches; ++i) launch();
  };
  return cuda::TimeGraph(stream, 0, 11, launches).median_us / kLaunches;
}

void Time(GpuGroup* group, cudaStream_t stream) {
  cuda::Tested() = cuda::Element::kHalf;
  for (const int32_t hidden : {4096, 8192}) {
    for (const int32_t tokens : {16, 64}) {
      const Sum sum(group->rank(), {.tokens = tokens, .rows = hidden});
      const auto time = [&](const cuda::PeerExchange& exchange) {
        return MicrosecondsEach(stream, [&] { sum.Launch(exchange, stream); });
      };
      const double own = time(*group->exchange()), norm = time({});
      const double nccl = MicrosecondsEach(stream, [&] {
        Must(group->AllReduce(sum.alone.get(), static_cast<int64_t>(sum.c.count()),
                              execution::kNcclFloat, stream));
      });
      if (group->rank() != 0) continue;
      std::printf(
          "%2d tokens x %d: norm %.2f us, with a sum over ranks %.2f us; NCCL's sum %.2f us\n",
          tokens, hidden, norm, own, nccl);
    }
  }
}

// A peer that never comes: the wait ends by the abort word, which `abort` sets, or by its limit.
// Returns how long it took.
double LosePeer(const Sum& sum, const cuda::PeerExchange& exchange, cudaStream_t stream,
                const std::function<void()>& abort) {
  const auto begin = std::chrono::steady_clock::now();
  sum.Launch(exchange, stream);
  if (abort) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    abort();
  }
  CUDA_OK(cudaStreamSynchronize(stream));
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

bool CheckLostPeer(GpuGroup* group, cudaStream_t stream, bool abort) {
  if (group->rank() != 0) return true;
  cuda::Tested() = cuda::Element::kHalf;
  const Sum sum(0, {.tokens = 1, .rows = 4096, .columns = 256});
  const double seconds = LosePeer(sum, *group->exchange(), stream,
                                  abort ? [group] { group->Abort(); } : std::function<void()>());
  const absl::Status status = group->Poll();
  const bool ok = absl::IsAborted(status) && seconds < (abort ? 0.2 : 3.0);
  std::printf("%s %s: %.3f s, \"%s\"\n", ok ? "ok  " : "FAIL",
              abort ? "told to end" : "past its limit", seconds,
              std::string(status.message()).c_str());
  return ok;
}

bool RunRank(int32_t rank, collectives::ShmRegion* region) {
  CUDA_OK(cudaSetDevice(rank));
  const auto host =
      Must(collectives::MakeShmCommunicator(region, rank, {.timeout = std::chrono::seconds(60)}));
  cudaStream_t stream = nullptr;
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  bool ok = true;
  const auto group = Must(GpuGroup::Join(
      {.host = host.get(), .exchange_columns = kColumnsMax, .patience = std::chrono::seconds(30)}));
  CHECK_MSG(group->exchange() != nullptr, "the GPUs cannot write to each other's memory");
  for (const SumCase& c : SumCases(1)) ok = CheckSum(*group, c, stream) && ok;
  ok = CheckLarge(group.get(), stream) && ok;
  Time(group.get(), stream);
  ok = CheckLostPeer(group.get(), stream, true) && ok;
  const auto impatient = Must(GpuGroup::Join(
      {.host = host.get(), .exchange_columns = kColumnsMax, .patience = std::chrono::seconds(2)}));
  ok = CheckLostPeer(impatient.get(), stream, false) && ok;
  return ok;
}

// Ranks that share a GPU: nothing of NCCL, and what kernels compute, order and wait for all the
// same. Everything is allocated before the first launch, as an allocation may wait for kernels that
// wait for peers.
class SharedGpu {
 public:
  explicit SharedGpu(int32_t ranks)
      : exchanges_(static_cast<size_t>(ranks)),
        streams_(exchanges_.size()),
        failed_(std::vector<uint32_t>(1, 0)) {
    CHECK(ranks >= 1 && ranks <= cuda::kPeersMax);
    CUDA_OK(cudaMallocHost(reinterpret_cast<void**>(&words_), 2 * sizeof(uint32_t)));
    words_[0] = words_[1] = 0;
    const int64_t product_words = cuda::ProductExchangeWords(16, kColumnsMax);
    const int64_t norm_words = cuda::NormExchangeWords(kTokensMax, kColumnsMax);
    const auto sets = static_cast<size_t>(2 * ranks);
    for (size_t rank = 0; rank < exchanges_.size(); ++rank) {
      products_.push_back(std::make_unique<DeviceArray<uint4>>(
          std::vector<uint4>(sets * static_cast<size_t>(product_words))));
      norms_.push_back(
          std::make_unique<DeviceArray<uint4>>(sets * static_cast<size_t>(norm_words)));
      epochs_.push_back(std::make_unique<DeviceArray<uint32_t>>(
          std::vector<uint32_t>(2 * cuda::kExchangeBlocksMax, 0)));
      CUDA_OK(cudaStreamCreateWithFlags(&streams_[rank], cudaStreamNonBlocking));
      exchanges_[rank] = {.rank = static_cast<int32_t>(rank),
                          .ranks = ranks,
                          .product_words = product_words,
                          .norm_words = norm_words,
                          .epochs = epochs_[rank]->get(),
                          .abort_word = &words_[0],
                          .fault = &words_[1],
                          .failed = failed_.get(),
                          .limit_ns = 2'000'000'000};
    }
    for (cuda::PeerExchange& exchange : exchanges_) {
      for (size_t peer = 0; peer < exchanges_.size(); ++peer) {
        exchange.products[peer] = products_[peer]->get();
        exchange.norms[peer] = norms_[peer]->get();
      }
    }
  }

  [[nodiscard]] bool Check(const SumCase& c) const {
    cuda::Tested() = c.element;
    std::vector<std::unique_ptr<Sum>> sums;
    std::vector<std::vector<float>> parts;
    for (size_t rank = 0; rank < exchanges_.size(); ++rank) {
      sums.push_back(std::make_unique<Sum>(static_cast<int32_t>(rank), c));
      parts.push_back(sums.back()->Part());
    }
    CUDA_OK(cudaDeviceSynchronize());
    for (int round = 0; round < kRounds; ++round) {
      for (size_t rank = 0; rank < sums.size(); ++rank) {
        sums[rank]->Launch(exchanges_[rank], streams_[rank]);
      }
    }
    CUDA_OK(cudaDeviceSynchronize());
    bool ok = words_[1] == 0;
    for (size_t rank = 0; rank < sums.size(); ++rank) {
      ok = SumHolds(*sums[rank], static_cast<int32_t>(rank), parts) && ok;
    }
    return ok;
  }

  // Rank 0 alone; afterwards its numbers are not the others' any more.
  [[nodiscard]] bool CheckLostPeer(const SumCase& c, bool abort) {
    cuda::Tested() = c.element;
    words_[0] = words_[1] = 0;
    failed_.Set({0});
    const Sum sum(0, c);
    cuda::PeerExchange exchange = exchanges_[0];
    exchange.limit_ns = abort ? 5'000'000'000 : 200'000'000;
    const double seconds = LosePeer(sum, exchange, streams_[0],
                                    abort ? [this] { words_[0] = 1; } : std::function<void()>());
    const auto want = abort ? cuda::ExchangeFault::kAborted : cuda::ExchangeFault::kTimeout;
    const bool ok = words_[1] == static_cast<uint32_t>(want) && seconds > (abort ? 0.04 : 0.15) &&
                    seconds < (abort ? 0.2 : 1.0);
    std::printf("%s a %s, %s: %.3f s\n", ok ? "ok  " : "FAIL", c.in_norm() ? "norm" : "product",
                abort ? "told to end" : "past its limit", seconds);
    return ok;
  }

 private:
  std::vector<std::unique_ptr<DeviceArray<uint4>>> products_, norms_;
  std::vector<std::unique_ptr<DeviceArray<uint32_t>>> epochs_;
  std::vector<cuda::PeerExchange> exchanges_;
  std::vector<cudaStream_t> streams_;
  uint32_t* words_ = nullptr;  // the abort word, then the fault
  DeviceArray<uint32_t> failed_;
};

int RunOnOneGpu(int32_t ranks) {
  SharedGpu gpu(ranks);
  bool ok = true;
  for (const SumCase& c : SumCases(ranks)) ok = gpu.Check(c) && ok;
  for (const int32_t columns : {256, 0}) {
    for (const bool abort : {true, false}) {
      if (ranks == 1) break;
      ok = gpu.CheckLostPeer({.tokens = 1, .rows = 4096, .columns = columns}, abort) && ok;
    }
  }
  std::printf("%s\n", ok ? "all of it holds" : "FAILED");
  return ok ? 0 : 1;
}

int Run(int32_t ranks) {
  auto region = Must(collectives::ShmRegion::Create(ranks));
  std::vector<pid_t> forks;
  for (int32_t rank = 1; rank < ranks; ++rank) {
    const pid_t pid = ::fork();
    CHECK(pid >= 0);
    if (pid == 0) {
      const bool ok = RunRank(rank, &region);
      std::fflush(stdout);
      ::_exit(ok ? 0 : 1);
    }
    forks.push_back(pid);
  }
  bool ok = RunRank(0, &region);
  for (const pid_t pid : forks) {
    int status = 0;
    ok = ::waitpid(pid, &status, 0) == pid && status == 0 && ok;
  }
  std::printf("%s\n", ok ? "all of it holds" : "FAILED");
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace nibble::gpu_check

int main(int argc, char** argv) {
  const bool one_gpu = argc > 1 && std::string_view(argv[1]) == "--one-gpu";
  const int ranks_at = one_gpu ? 2 : 1;
  const int32_t ranks = argc > ranks_at ? std::atoi(argv[ranks_at]) : 2;
  return one_gpu ? nibble::gpu_check::RunOnOneGpu(ranks) : nibble::gpu_check::Run(ranks);
}
