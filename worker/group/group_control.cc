#include "worker/group/group_control.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace nibble::group {
namespace {

// Waits happen at start only.
constexpr auto kPoll = std::chrono::milliseconds(1);

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

RankFacts FactsIn(const RankSlot& slot) {
  return {.model_hash = slot.model_hash,
          .config_hash = slot.config_hash,
          .build_hash = slot.build_hash,
          .rank_count = slot.rank_count,
          .kv_blocks = slot.kv_blocks};
}

}  // namespace

absl::Status CompareFacts(const RankFacts& own, std::string_view who, const RankFacts& first,
                          std::string_view the_first) {
  const auto differs = [&](const char* what, uint64_t mine, uint64_t theirs) {
    return absl::FailedPreconditionError(absl::StrCat(View(who), " differs from ", View(the_first),
                                                      " in its ", what, " (", absl::Hex(mine),
                                                      " here, ", absl::Hex(theirs), " there)"));
  };
  if (own.model_hash != first.model_hash) return differs("model", own.model_hash, first.model_hash);
  if (own.config_hash != first.config_hash) {
    return differs("configuration", own.config_hash, first.config_hash);
  }
  if (own.build_hash != first.build_hash) return differs("build", own.build_hash, first.build_hash);
  if (own.rank_count == first.rank_count) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(View(who), " differs from ", View(the_first),
                                                    " in its number of ranks (", own.rank_count,
                                                    " here, ", first.rank_count, " there)"));
}

void SetExitReason(RankSlot* slot, int exit_code, std::string_view message) {
  int32_t none = 0;
  if (!slot->exit_code.compare_exchange_strong(none, exit_code)) return;
  slot->exit_reason.Set(message);
}

absl::StatusOr<int32_t> Handshake::Introduce(const RankFacts& facts, Deadline deadline) {
  RankSlot& mine = slot(rank_);
  mine.model_hash = facts.model_hash;
  mine.config_hash = facts.config_hash;
  mine.build_hash = facts.build_hash;
  mine.rank_count = facts.rank_count;
  mine.kv_blocks = facts.kv_blocks;
  mine.phase.store(RankPhase::kIntroduced, std::memory_order_release);
  RETURN_IF_ERROR(AwaitPhase(RankPhase::kIntroduced, deadline));

  const RankSlot& first = slot(0);
  int32_t kv_blocks = first.kv_blocks;
  for (int32_t rank = 1; rank < rank_count_; ++rank) {
    const RankSlot& other = slot(rank);
    RETURN_IF_ERROR(
        CompareFacts(FactsIn(other), absl::StrCat("rank ", rank), FactsIn(first), "rank 0"));
    kv_blocks = std::min(kv_blocks, other.kv_blocks.load());
  }
  return kv_blocks;
}

absl::Status Handshake::AwaitLoaded(Deadline deadline) {
  slot(rank_).phase.store(RankPhase::kLoaded, std::memory_order_release);
  return AwaitPhase(RankPhase::kLoaded, deadline);
}

absl::Status Handshake::AwaitPhase(RankPhase phase, Deadline deadline) const {
  for (int32_t rank = 0; rank < rank_count_; ++rank) {
    while (slot(rank).phase.load(std::memory_order_acquire) < phase) {
      if (clock_->Now() >= deadline) {
        return absl::DeadlineExceededError(absl::StrCat("rank ", rank, " did not come in time"));
      }
      std::this_thread::sleep_for(kPoll);
    }
  }
  return absl::OkStatus();
}

}  // namespace nibble::group
