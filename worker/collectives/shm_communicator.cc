#include "worker/collectives/shm_communicator.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"
#include "worker/collectives/event_word.h"
#include "worker/collectives/shm_region.h"
#include "worker/collectives/sum.h"

namespace nibble::collectives {
namespace {

enum class Operation : uint64_t { kAllReduce = 1, kAllGather = 2, kBroadcast = 3 };

class ShmCommunicator final : public Communicator {
 public:
  ShmCommunicator(ShmRegion* region, int32_t rank, const ShmOptions& options)
      : region_(region),
        header_(region->header()),
        rank_(rank),
        size_(region->ranks()),
        timeout_(options.timeout),
        spin_(SpinBudget(options.waiting_threads > 0 ? options.waiting_threads : size_)) {}

  int32_t rank() const override { return rank_; }
  int32_t size() const override { return size_; }

  absl::Status AllReduceSum(std::span<float> data) override {
    const size_t chunk = static_cast<size_t>(header_->slot_bytes) / sizeof(float);
    for (size_t begin = 0; begin < data.size(); begin += chunk) {
      const std::span<float> part = data.subspan(begin, std::min(chunk, data.size() - begin));
      std::memcpy(MySlot(), part.data(), part.size_bytes());
      RETURN_IF_ERROR(CompleteRound(Operation::kAllReduce, part.size_bytes()));
      std::memcpy(part.data(), SlotOf(0), part.size_bytes());
      for (int32_t peer = 1; peer < size_; ++peer) {
        AddTo(part, reinterpret_cast<const float*>(SlotOf(peer)));
      }
    }
    return CheckAbort();
  }

  absl::Status AllGather(std::span<const std::byte> mine, std::span<std::byte> all) override {
    CHECK(all.size() == mine.size() * static_cast<size_t>(size_));
    const auto chunk = static_cast<size_t>(header_->slot_bytes);
    for (size_t begin = 0; begin < mine.size(); begin += chunk) {
      const size_t bytes = std::min(chunk, mine.size() - begin);
      std::memcpy(MySlot(), mine.data() + begin, bytes);
      RETURN_IF_ERROR(CompleteRound(Operation::kAllGather, bytes));
      for (int32_t peer = 0; peer < size_; ++peer) {
        std::memcpy(all.data() + static_cast<size_t>(peer) * mine.size() + begin, SlotOf(peer),
                    bytes);
      }
    }
    return CheckAbort();
  }

  absl::Status Broadcast(std::span<std::byte> data, int32_t root) override {
    CHECK(root >= 0 && root < size_);
    const auto chunk = static_cast<size_t>(header_->slot_bytes);
    for (size_t begin = 0; begin < data.size(); begin += chunk) {
      const std::span<std::byte> part = data.subspan(begin, std::min(chunk, data.size() - begin));
      if (rank_ == root) std::memcpy(MySlot(), part.data(), part.size());
      RETURN_IF_ERROR(CompleteRound(Operation::kBroadcast, part.size()));
      if (rank_ != root) std::memcpy(part.data(), SlotOf(root), part.size());
    }
    return CheckAbort();
  }

  void Abort() override { region_->Abort(); }

 private:
  // Slots of the round that is being filled, and after CompleteRound of the one just completed.
  std::byte* MySlot() { return header_->slot(rank_, round_ + 1); }
  const std::byte* SlotOf(int32_t peer) { return header_->slot(peer, round_); }

  absl::Status CheckAbort() const {
    if (header_->aborted.load(std::memory_order_acquire) == 0) return absl::OkStatus();
    return absl::AbortedError("the group was aborted");
  }

  absl::Status CompleteRound(Operation operation, size_t bytes) {
    RETURN_IF_ERROR(CheckAbort());
    const uint64_t round = ++round_;
    ShmRegion::Header::PerRank& mine = header_->per_rank[rank_];
    mine.kind[round % 2] = static_cast<uint64_t>(bytes) * 4 + static_cast<uint64_t>(operation);
    mine.round.store(round, std::memory_order_relaxed);
    const uint64_t arrivals = header_->arrivals.fetch_add(1, std::memory_order_acq_rel) + 1;
    if (arrivals == round * static_cast<uint64_t>(size_)) {
      header_->completed.store(round, std::memory_order_release);
      header_->event.Signal();
    } else {
      RETURN_IF_ERROR(WaitForRound(round));
    }
    return CheckKinds(round);
  }

  absl::Status WaitForRound(uint64_t round) {
    const auto ready = [&] {
      return header_->completed.load(std::memory_order_acquire) >= round ||
             header_->aborted.load(std::memory_order_acquire) != 0;
    };
    const Deadline deadline = std::chrono::steady_clock::now() + timeout_;
    if (header_->event.Await(ready, spin_, deadline)) return CheckAbort();
    const std::string message = DescribeMissing(round);
    region_->Abort();
    return absl::DeadlineExceededError(message);
  }

  std::string DescribeMissing(uint64_t round) const {
    std::string ranks;
    for (int32_t peer = 0; peer < size_; ++peer) {
      if (header_->per_rank[peer].round.load(std::memory_order_relaxed) < round) {
        absl::StrAppend(&ranks, ranks.empty() ? "" : ", ", peer);
      }
    }
    return absl::StrCat("rank ", rank_, " waited ",
                        std::chrono::duration_cast<std::chrono::milliseconds>(timeout_).count(),
                        " ms in a collective; missing: rank ", ranks);
  }

  // Ranks that run different operations would read each other's bytes as something else.
  absl::Status CheckKinds(uint64_t round) {
    for (int32_t peer = 0; peer < size_; ++peer) {
      if (header_->per_rank[peer].kind[round % 2] == header_->per_rank[rank_].kind[round % 2]) {
        continue;
      }
      region_->Abort();
      return absl::InternalError(
          absl::StrCat("ranks ", rank_, " and ", peer, " called different collectives or sizes"));
    }
    return absl::OkStatus();
  }

  ShmRegion* const region_;
  ShmRegion::Header* const header_;
  const int32_t rank_;
  const int32_t size_;
  const Duration timeout_;
  const Duration spin_;
  uint64_t round_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> MakeShmCommunicator(ShmRegion* region, int32_t rank,
                                                                  const ShmOptions& options) {
  if (rank < 0 || rank >= region->ranks()) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", rank, " is not in 0 ... ", region->ranks() - 1));
  }
  // A second communicator of the same rank would count its rounds from zero again.
  if (region->header()->per_rank[rank].attached.exchange(1) != 0) {
    return absl::AlreadyExistsError(absl::StrCat("rank ", rank, " is attached already"));
  }
  return std::make_unique<ShmCommunicator>(region, rank, options);
}

}  // namespace nibble::collectives
