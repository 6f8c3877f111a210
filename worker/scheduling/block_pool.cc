#include "worker/scheduling/block_pool.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"

namespace nibble::scheduling {

BlockPool::BlockPool(int32_t block_count, const PrefixOptions& options)
    : index_(block_count, options.key, options.model),
      owner_blocks_max_(std::max(1, static_cast<int32_t>(options.owner_share * block_count))) {
  CHECK(block_count >= 0);
  blocks_.resize(static_cast<size_t>(block_count));
  free_ring_.resize(static_cast<size_t>(block_count));
  for (int32_t block = 0; block < block_count; ++block) {
    free_ring_[static_cast<size_t>(block)] = block;
  }
  free_count_ = block_count;
  links_.resize(static_cast<size_t>(block_count));
}

bool BlockPool::Allocate(int32_t count, std::vector<int32_t>* out) {
  CHECK(count >= 0);
  if (count > available()) return false;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t block = TakeOne();
    At(block).state = State::kUsed;
    At(block).holders = 1;
    At(block).last_step = 0;
    out->push_back(block);
  }
  return true;
}

int32_t BlockPool::TakeOne() {
  if (free_count_ == 0) Forget(index_.LongestResting());
  const int32_t block = free_ring_[free_begin_];
  if (++free_begin_ == free_ring_.size()) free_begin_ = 0;
  --free_count_;
  return block;
}

void BlockPool::Hold(int32_t block) {
  CHECK(index_.Has(block));
  Block& held = At(block);
  if (held.state == State::kCached) index_.Wake(block);
  if (held.state == State::kQuarantined) quarantine_.Remove(block, &links_);
  held.state = State::kUsed;
  ++held.holders;
}

void BlockPool::Free(std::span<const int32_t> blocks, uint64_t last_step) {
  for (const int32_t block : blocks) {
    CHECK(block >= 0 && block < total());
    Block& freed = At(block);
    CHECK_MSG(freed.state == State::kUsed, "a block was freed twice");
    freed.last_step = std::max(freed.last_step, last_step);
    if (--freed.holders > 0) continue;
    if (freed.last_step <= retired_) {
      Release(block);
      continue;
    }
    freed.state = State::kQuarantined;
    quarantine_.Append(block, &links_);
  }
}

void BlockPool::Retire(uint64_t step) {
  retired_ = std::max(retired_, step);
  for (int32_t block = quarantine_.first, next = -1; block >= 0; block = next) {
    next = links_[static_cast<size_t>(block)].after;
    if (At(block).last_step > retired_) continue;
    quarantine_.Remove(block, &links_);
    Release(block);
  }
}

// What has a name stays cached. An owner with more than its share loses what it has had cached
// longest, so that no flood of prompts drives out what others keep.
void BlockPool::Release(int32_t block) {
  if (!index_.Has(block)) return AddFree(block);
  At(block).state = State::kCached;
  index_.Rest(block);
  const PrefixOwner* owner = index_.OwnerOf(block);
  while (index_.owners() > 1 && owner->resting.size > owner_blocks_max_) {
    Forget(owner->resting.first);
  }
}

void BlockPool::AddFree(int32_t block) {
  At(block).state = State::kFree;
  size_t end = free_begin_ + static_cast<size_t>(free_count_);
  if (end >= free_ring_.size()) end -= free_ring_.size();
  free_ring_[end] = block;
  ++free_count_;
}

void BlockPool::Forget(int32_t block) {
  const bool cached = At(block).state == State::kCached;
  if (cached) index_.Wake(block);
  index_.Erase(block);
  if (cached) AddFree(block);
}

int32_t BlockPool::Publish(int32_t block, const PrefixBlock& content) {
  CHECK(At(block).state == State::kUsed);
  const int32_t known = index_.Find(content);
  if (known >= 0) return known;
  // The same name for something else: what it follows has gone, so nobody can find it.
  const int32_t stale = index_.FindName(content.name);
  if (stale >= 0) Forget(stale);
  index_.Insert(block, content);
  return block;
}

void BlockPool::Withdraw(std::span<const int32_t> blocks) {
  for (const int32_t block : blocks) {
    if (index_.Has(block)) Forget(block);
  }
}

absl::Status BlockPool::CheckInvariants() const {
  const auto broken = [](int32_t block, absl::string_view what) {
    return absl::InternalError(absl::StrCat("block ", block, " ", what));
  };
  RETURN_IF_ERROR(index_.CheckInvariants());
  std::vector<int32_t> seen(blocks_.size(), 0);
  for (int32_t i = 0; i < free_count_; ++i) {
    const int32_t block = free_ring_[(free_begin_ + static_cast<size_t>(i)) % free_ring_.size()];
    if (At(block).state != State::kFree) return broken(block, "is listed as free and is not");
    ++seen[static_cast<size_t>(block)];
  }
  for (int32_t block = quarantine_.first; block >= 0;
       block = links_[static_cast<size_t>(block)].after) {
    if (At(block).last_step <= retired_) {
      return broken(block, "is quarantined for a step that has retired");
    }
    ++seen[static_cast<size_t>(block)];
  }
  int32_t cached = 0;
  int32_t quarantined = 0;
  for (int32_t block = 0; block < total(); ++block) {
    const Block& one = At(block);
    const bool listed = one.state == State::kFree || one.state == State::kQuarantined;
    if (seen[static_cast<size_t>(block)] != (listed ? 1 : 0)) return broken(block, "is lost");
    if ((one.state == State::kUsed) != (one.holders > 0)) return broken(block, "has odd holders");
    const bool named = index_.Has(block);
    if (one.state == State::kFree && named) return broken(block, "is free and has a name");
    if (one.state == State::kCached && !named) return broken(block, "is cached without a name");
    cached += one.state == State::kCached ? 1 : 0;
    quarantined += one.state == State::kQuarantined ? 1 : 0;
  }
  if (cached != index_.resting()) return absl::InternalError("cached blocks do not add up");
  if (quarantined != quarantine_.size) return absl::InternalError("quarantine does not add up");
  return absl::OkStatus();
}

}  // namespace nibble::scheduling
