// How the ranks of one machine and their supervisor come together: what each rank is, how far it
// has loaded, where the leader listens, and why a rank ends. One block of shared memory.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/step/group_stats.h"

namespace nibble::group {

// Rises only.
enum class RankPhase : int32_t { kStarting = 0, kIntroduced = 1, kLoaded = 2, kServing = 3 };

// A range of ranks: those of one machine.
struct RankRange {
  int32_t first = 0;
  int32_t count = 0;
  [[nodiscard]] bool Contains(int32_t rank) const { return rank >= first && rank - first < count; }
};

// What the ranks of a group must have in common.
struct RankFacts {
  uint64_t model_hash = 0;   // checkpoint identity
  uint64_t config_hash = 0;  // of the options that decide what a step computes
  uint64_t build_hash = 0;   // version and revision
  int32_t rank_count = 0;
  int32_t kv_blocks = 0;  // of this rank; the group takes the smallest
};

// A short text that one process writes once and others read. All zero bytes is "not written".
template <size_t kBytes>
struct SharedText {
  std::atomic<uint32_t> size_plus_one{0};
  std::array<char, kBytes> bytes{};

  // Cut to what fits.
  void Set(std::string_view text) {
    const size_t size = text.size() < kBytes ? text.size() : kBytes;
    for (size_t i = 0; i < size; ++i) bytes[i] = text[i];
    size_plus_one.store(static_cast<uint32_t>(size) + 1, std::memory_order_release);
  }
  // Allocates nothing, unlike Get().
  [[nodiscard]] bool written() const { return size_plus_one.load(std::memory_order_acquire) != 0; }
  [[nodiscard]] std::optional<std::string> Get() const {
    const uint32_t size = size_plus_one.load(std::memory_order_acquire);
    if (size == 0 || size > kBytes + 1) return std::nullopt;  // nothing, or nonsense
    return std::string(bytes.data(), size - 1);
  }
};

// One rank writes, everybody reads.
struct RankSlot {
  std::atomic<RankPhase> phase{RankPhase::kStarting};
  std::atomic<uint64_t> model_hash{0}, config_hash{0}, build_hash{0};
  std::atomic<int32_t> rank_count{0}, kv_blocks{0};
  std::atomic<int64_t> load_bytes_done{0}, load_bytes_total{0};
  std::atomic<int32_t> exit_code{0};
  SharedText<500> exit_reason;  // set before the rank ends on an error; exit_code is valid then
};

// Where the ranks of several machines find each other for their collectives; written by the
// supervisor before it starts ranks. Nothing is set in a group of one machine.
struct Rendezvous {
  SharedText<256> host;  // of the store (worker/collectives/store.h)
  std::atomic<uint32_t> port{0};
  std::atomic<uint64_t> key{0};
  SharedText<64> own_address;  // of this machine, for the others
};

struct GroupControl {
  // In a group of several machines, the others' slots hold what was last heard of them.
  std::array<RankSlot, step::kMaxRanks> ranks;
  SharedText<200> address;  // where the leader listens, once it does
  Rendezvous rendezvous;
};

// OK, or FAILED_PRECONDITION "WHO differs from THE_FIRST in its model (1a2b here, 3c4d there)".
[[nodiscard]] absl::Status CompareFacts(const RankFacts& own, std::string_view who,
                                        const RankFacts& first, std::string_view the_first);

// Notes why this rank is about to end. The first reason stays.
void SetExitReason(RankSlot* slot, int exit_code, std::string_view message);

// One rank's side of the meeting at start.
class Handshake {
 public:
  // Borrowed; outlive it.
  Handshake(GroupControl* control, int32_t rank, int32_t rank_count, const Clock* clock)
      : control_(control), rank_(rank), rank_count_(rank_count), clock_(clock) {}

  // Shows `facts` and waits for those of all ranks. The smallest rank's kv_blocks, or
  // FAILED_PRECONDITION naming the rank that differs and in what, or DEADLINE_EXCEEDED naming the
  // rank that did not come.
  [[nodiscard]] absl::StatusOr<int32_t> Introduce(const RankFacts& facts, Deadline deadline);

  // Waits until every rank has loaded.
  [[nodiscard]] absl::Status AwaitLoaded(Deadline deadline);

 private:
  absl::Status AwaitPhase(RankPhase phase, Deadline deadline) const;
  [[nodiscard]] RankSlot& slot(int32_t rank) const {
    return control_->ranks[static_cast<size_t>(rank)];
  }

  GroupControl* control_;
  const int32_t rank_;
  const int32_t rank_count_;
  const Clock* clock_;
};

}  // namespace nibble::group
