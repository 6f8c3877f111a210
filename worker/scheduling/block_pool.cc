#include "worker/scheduling/block_pool.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nibble::scheduling {

BlockPool::BlockPool(int32_t block_count) {
  CHECK(block_count >= 0);
  states_.assign(static_cast<size_t>(block_count), State::kFree);
  free_ring_.resize(static_cast<size_t>(block_count));
  for (int32_t block = 0; block < block_count; ++block) {
    free_ring_[static_cast<size_t>(block)] = block;
  }
  free_count_ = block_count;
  quarantine_.reserve(static_cast<size_t>(block_count));
}

bool BlockPool::Allocate(int32_t count, std::vector<int32_t>* out) {
  CHECK(count >= 0);
  if (count > free_count_) return false;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t block = free_ring_[free_begin_];
    if (++free_begin_ == free_ring_.size()) free_begin_ = 0;
    states_[static_cast<size_t>(block)] = State::kUsed;
    out->push_back(block);
  }
  free_count_ -= count;
  return true;
}

void BlockPool::Free(std::span<const int32_t> blocks, uint64_t last_step) {
  for (const int32_t block : blocks) {
    CHECK(block >= 0 && block < total());
    State& state = states_[static_cast<size_t>(block)];
    CHECK_MSG(state == State::kUsed, "a block was freed twice");
    if (last_step <= retired_) {
      Release(block);
    } else {
      state = State::kQuarantined;
      quarantine_.push_back({.block = block, .last_step = last_step});
    }
  }
}

void BlockPool::Retire(uint64_t step) {
  retired_ = std::max(retired_, step);
  size_t kept = 0;
  for (const Waiting& waiting : quarantine_) {
    if (waiting.last_step <= retired_) {
      Release(waiting.block);
    } else {
      quarantine_[kept++] = waiting;
    }
  }
  quarantine_.resize(kept);
}

void BlockPool::Release(int32_t block) {
  states_[static_cast<size_t>(block)] = State::kFree;
  size_t end = free_begin_ + static_cast<size_t>(free_count_);
  if (end >= free_ring_.size()) end -= free_ring_.size();
  free_ring_[end] = block;
  ++free_count_;
}

absl::Status BlockPool::CheckInvariants() const {
  std::vector<int32_t> seen(states_.size(), 0);
  for (int32_t i = 0; i < free_count_; ++i) {
    const int32_t block = free_ring_[(free_begin_ + static_cast<size_t>(i)) % free_ring_.size()];
    if (states_[static_cast<size_t>(block)] != State::kFree) {
      return absl::InternalError(absl::StrCat("block ", block, " is listed as free and is not"));
    }
    ++seen[static_cast<size_t>(block)];
  }
  for (const Waiting& waiting : quarantine_) {
    if (states_[static_cast<size_t>(waiting.block)] != State::kQuarantined) {
      return absl::InternalError(
          absl::StrCat("block ", waiting.block, " is listed as quarantined and is not"));
    }
    if (waiting.last_step <= retired_) {
      return absl::InternalError(
          absl::StrCat("block ", waiting.block, " is quarantined for a step that has retired"));
    }
    ++seen[static_cast<size_t>(waiting.block)];
  }
  for (size_t block = 0; block < states_.size(); ++block) {
    const int32_t expected = states_[block] == State::kUsed ? 0 : 1;
    if (seen[block] != expected) {
      return absl::InternalError(
          absl::StrCat("block ", block, " is listed ", seen[block], " times"));
    }
  }
  return absl::OkStatus();
}

}  // namespace nibble::scheduling
