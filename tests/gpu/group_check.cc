// Holds the sums over GPUs to plain ones, times them, and sees waits for a lost peer end.
//
//   group_check [RANKS]              one GPU a rank; 2 unless given
//   group_check --one-gpu [RANKS]    the small sums alone, every rank on a stream of one GPU
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/check.h"
#include "kernels/cuda/all_reduce.h"
#include "kernels/layout/gpu_x.h"
#include "tests/gpu/comparison.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/graph_timer.h"
#include "tests/support/must.h"
#include "worker/collectives/shm_communicator.h"
#include "worker/execution/cuda/gpu_group.h"

namespace nibble::gpu_check {
namespace {

using cuda::DeviceArray;
using execution::GpuGroup;
using testing::Must;

constexpr int32_t kTokensMax = 16;
constexpr int32_t kHiddenMax = 8192;
constexpr int32_t kBlocksMax = kTokensMax * cuda::ExchangeParts(kHiddenMax);

std::vector<float> Normal(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// What a sum takes in and leaves, on this rank's device; the next input in the order for weights of
// `group`, or by rows where that is negative.
struct Sum {
  Sum(int32_t rank, int32_t tokens_of, int32_t hidden_of, int32_t group = -1)
      : tokens(tokens_of),
        hidden(hidden_of),
        order(group < 0 ? layout::GpuFragmentOrder{} : layout::GpuFragments(tokens, group)),
        count(static_cast<size_t>(tokens) * static_cast<size_t>(hidden)),
        partial(Normal(count, 100 + static_cast<uint32_t>(rank))),
        residual(Normal(count, 1)),
        weight(count),
        scale(std::vector<float>(static_cast<size_t>(tokens), 3.0f)),
        x(std::max(count, static_cast<size_t>(layout::GpuFragmentCount(tokens, hidden)))),
        squares(static_cast<size_t>(tokens * cuda::ExchangeParts(hidden))) {
    weight.Set(std::vector<cuda::Real16>(count, cuda::ToReal(1.5f)));
  }
  [[nodiscard]] cuda::AllReduceAddParams Params(const cuda::PeerExchange& exchange) const {
    return {.exchange = exchange,
            .partial = partial.get(),
            .residual = residual.get(),
            .tokens = tokens,
            .hidden = hidden,
            .next = {.x = x.get(),
                     .norm_weight = weight.get(),
                     .scale = scale.get(),
                     .square_sums = squares.get(),
                     .order = order}};
  }
  // Where element i of [token][k] lies in x.
  [[nodiscard]] size_t InX(size_t i) const {
    const auto at = static_cast<int32_t>(i);
    return static_cast<size_t>(order.Index(at / hidden, at % hidden, hidden));
  }

  const int32_t tokens, hidden;
  const layout::GpuFragmentOrder order;
  const size_t count;
  DeviceArray<float> partial, residual;
  DeviceArray<cuda::Real16> weight;
  DeviceArray<float> scale;
  DeviceArray<cuda::Real16> x;
  DeviceArray<float> squares;
};

struct SumCase {
  int32_t tokens, hidden;
  int32_t weights_group = -1;  // of the next product, whose order x then has
  cuda::Element element = cuda::Element::kHalf;
};

std::vector<SumCase> SumCases() {
  std::vector<SumCase> cases;
  for (const int32_t hidden : {64, 576, 4096, 5120, 8192}) {
    for (const int32_t tokens : {1, 3, 16}) cases.push_back({tokens, hidden});
    cases.push_back({3, hidden, -1, cuda::Element::kBfloat16});
    for (const int32_t tokens : {2, 8, 16}) {
      for (const int32_t weights_group : {32, 64, 128}) {
        cases.push_back({tokens, hidden, weights_group});
      }
      cases.push_back({tokens, hidden, 64, cuda::Element::kBfloat16});
    }
  }
  return cases;
}

// How often a case's sum is taken before it is looked at.
constexpr int kRounds = 5;

// What `rank` holds after kRounds sums over `ranks`.
bool SumHolds(const Sum& sum, const SumCase& c, int32_t rank, int32_t ranks) {
  std::vector<float> total(sum.count, 0.0f);
  for (int32_t peer = 0; peer < ranks; ++peer) {
    const auto part = Normal(sum.count, 100 + static_cast<uint32_t>(peer));
    for (size_t i = 0; i < sum.count; ++i) total[i] += part[i];
  }
  std::vector<float> want = Normal(sum.count, 1);
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < sum.count; ++i) want[i] += total[i];
  }
  const std::vector<float> got = sum.residual.Get();
  const std::vector<cuda::Real16> x = sum.x.Get();
  const std::vector<float> squares = sum.squares.Get();
  size_t wrong = 0, misplaced = 0;
  double squares_want = 0, squares_got = 0, x_error = 0;
  for (size_t i = 0; i < sum.count; ++i) {
    if (got[i] != want[i]) ++wrong;  // in rank order: the same bits
    squares_want += static_cast<double>(want[i]) * want[i];
    const double normed = static_cast<double>(want[i]) * 4.5 * cuda::kNormedInputFactor;
    const double error = std::abs(cuda::Double(x[sum.InX(i)]) - normed);
    if (!(error < cuda::Limit(2e-3))) ++misplaced;  // also where nothing was written
    x_error = std::max(x_error, error);
  }
  for (const float part : squares) squares_got += static_cast<double>(part);
  const bool ok = wrong == 0 && misplaced == 0 && std::abs(squares_got / squares_want - 1) < 1e-5;
  std::printf(
      "%s rank %d: %s sum of %d x %d, order %d: %zu values differ, squares %.2e, x %.1e, "
      "%zu misplaced\n",
      ok ? "ok  " : "FAIL", rank, cuda::TestedName(), c.tokens, c.hidden, c.weights_group, wrong,
      squares_got / squares_want - 1, x_error, misplaced);
  return ok;
}

bool CheckSum(const GpuGroup& group, const SumCase& c, cudaStream_t stream) {
  cuda::Tested() = c.element;
  Sum sum(group.rank(), c.tokens, c.hidden, c.weights_group);
  for (int round = 0; round < kRounds; ++round) {
    CUDA_OK(cuda::AllReduceAdd(sum.Params(*group.exchange()),
                               {.stream = stream, .dependent = true, .element = c.element}));
  }
  CUDA_OK(cudaStreamSynchronize(stream));
  return SumHolds(sum, c, group.rank(), group.ranks());
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
  for (const int32_t hidden : {4096, 8192}) {
    for (const int32_t tokens : {1, 4, 8, 16}) {
      Sum sum(group->rank(), tokens, hidden);
      const double own = MicrosecondsEach(stream, [&] {
        CUDA_OK(cuda::AllReduceAdd(sum.Params(*group->exchange()),
                                   {.stream = stream, .dependent = true}));
      });
      const double nccl = MicrosecondsEach(stream, [&] {
        Must(group->AllReduce(sum.partial.get(), static_cast<int64_t>(sum.count),
                              execution::kNcclFloat, stream));
        CUDA_OK(cuda::AddPartial({.residual = sum.residual.get(),
                                  .partial_float = sum.partial.get(),
                                  .count = static_cast<int64_t>(sum.count)},
                                 {.stream = stream}));
      });
      if (group->rank() != 0) continue;
      std::printf("%2d tokens x %d, %4zu KB: own kernel %.2f us, NCCL and add %.2f us\n", tokens,
                  hidden, sum.count * 4 / 1024, own, nccl);
    }
  }
}

// A peer that never comes: the wait ends by the abort word, or by its limit.
bool CheckLostPeer(GpuGroup* group, cudaStream_t stream, bool abort) {
  if (group->rank() != 0) return true;
  Sum sum(0, 1, 4096);
  const auto begin = std::chrono::steady_clock::now();
  CUDA_OK(cuda::AllReduceAdd(sum.Params(*group->exchange()), {.stream = stream}));
  if (abort) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    group->Abort();
  }
  CUDA_OK(cudaStreamSynchronize(stream));
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
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
      {.host = host.get(), .exchange_blocks = kBlocksMax, .patience = std::chrono::seconds(30)}));
  CHECK_MSG(group->exchange() != nullptr, "the GPUs cannot write to each other's memory");
  for (const SumCase& c : SumCases()) ok = CheckSum(*group, c, stream) && ok;
  ok = CheckLarge(group.get(), stream) && ok;
  Time(group.get(), stream);
  ok = CheckLostPeer(group.get(), stream, true) && ok;
  const auto impatient = Must(GpuGroup::Join(
      {.host = host.get(), .exchange_blocks = kBlocksMax, .patience = std::chrono::seconds(2)}));
  ok = CheckLostPeer(impatient.get(), stream, false) && ok;
  return ok;
}

// Ranks that share a GPU: nothing of NCCL, and what the kernel computes, orders and waits for all
// the same. Everything is allocated before the first launch, as an allocation may wait for kernels
// that wait for peers.
int RunOnOneGpu(int32_t ranks) {
  CHECK(ranks >= 1 && ranks <= cuda::kPeersMax);
  const auto size = static_cast<size_t>(ranks);
  const auto slot_words =
      static_cast<size_t>(cuda::ExchangeSlotBytes(ranks, kBlocksMax)) / sizeof(uint4);
  std::vector<std::unique_ptr<DeviceArray<uint4>>> slots;
  std::vector<std::unique_ptr<DeviceArray<uint32_t>>> epochs;
  std::vector<cudaStream_t> streams(size);
  uint32_t* words = nullptr;  // the abort word, then the fault
  CUDA_OK(cudaMallocHost(reinterpret_cast<void**>(&words), 2 * sizeof(uint32_t)));
  words[0] = words[1] = 0;
  DeviceArray<uint32_t> failed(std::vector<uint32_t>(1, 0));
  std::vector<cuda::PeerExchange> exchanges(size);
  for (size_t rank = 0; rank < size; ++rank) {
    slots.push_back(std::make_unique<DeviceArray<uint4>>(std::vector<uint4>(slot_words)));
    epochs.push_back(std::make_unique<DeviceArray<uint32_t>>(std::vector<uint32_t>(kBlocksMax, 0)));
    CUDA_OK(cudaStreamCreateWithFlags(&streams[rank], cudaStreamNonBlocking));
    exchanges[rank] = {.rank = static_cast<int32_t>(rank),
                       .ranks = ranks,
                       .blocks_max = kBlocksMax,
                       .epochs = epochs[rank]->get(),
                       .abort_word = &words[0],
                       .fault = &words[1],
                       .failed = failed.get(),
                       .limit_ns = 2'000'000'000};
  }
  for (cuda::PeerExchange& exchange : exchanges) {
    for (size_t peer = 0; peer < size; ++peer) exchange.slots[peer] = slots[peer]->get();
  }
  bool ok = true;
  for (const SumCase& c : SumCases()) {
    cuda::Tested() = c.element;
    std::vector<std::unique_ptr<Sum>> sums;
    for (int32_t rank = 0; rank < ranks; ++rank) {
      sums.push_back(std::make_unique<Sum>(rank, c.tokens, c.hidden, c.weights_group));
    }
    CUDA_OK(cudaDeviceSynchronize());
    for (int round = 0; round < kRounds; ++round) {
      for (size_t rank = 0; rank < size; ++rank) {
        CUDA_OK(
            cuda::AllReduceAdd(sums[rank]->Params(exchanges[rank]),
                               {.stream = streams[rank], .dependent = true, .element = c.element}));
      }
    }
    CUDA_OK(cudaDeviceSynchronize());
    for (int32_t rank = 0; rank < ranks; ++rank) {
      ok = SumHolds(*sums[static_cast<size_t>(rank)], c, rank, ranks) && ok;
    }
  }
  ok = words[1] == 0 && ok;
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
