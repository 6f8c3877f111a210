#include "worker/scheduling/fair_queue.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nibble::scheduling {
namespace {

// Shares that hold nothing are kept this many at most, so that names alone fill no memory.
constexpr size_t kSharesMax = 1024;

}  // namespace

FairShare* FairQueue::ShareOf(std::string_view tenant, size_t priority) {
  const auto found = shares_.find(Key{tenant, priority});
  if (found != shares_.end()) return found->second.get();
  if (shares_.size() >= kSharesMax) ForgetIdle();
  auto share = std::make_unique<FairShare>();
  share->tenant = tenant;
  share->priority = priority;
  FairShare* const raw = share.get();
  shares_.emplace(Key{raw->tenant, priority}, std::move(share));
  return raw;
}

// Who comes back is lifted to where the others are, which is about where it was.
void FairQueue::ForgetIdle() {
  std::erase_if(shares_, [this](const auto& entry) {
    const FairShare& share = *entry.second;
    return share.sequences == 0 && last_to_leave_[share.priority] != &share;
  });
}

void FairQueue::Join(std::string_view tenant, Priority priority, Sequence* sequence) {
  CHECK(sequence->share == nullptr);
  sequence->share = ShareOf(tenant, static_cast<size_t>(priority));
  ++sequence->share->sequences;
}

void FairQueue::Leave(Sequence* sequence) {
  --sequence->share->sequences;
  sequence->share = nullptr;
}

void FairQueue::Lift(FairShare* share) {
  const std::vector<FairShare*>& others = waiting_[share->priority];
  const FairShare* last = last_to_leave_[share->priority];
  uint64_t least = last == nullptr ? 0 : last->service;
  if (!others.empty()) {
    least = (*std::min_element(others.begin(), others.end(), [](const auto* a, const auto* b) {
              return a->service < b->service;
            }))->service;
  }
  share->service = std::max(share->service, least);
}

void FairQueue::Push(Sequence* sequence) {
  FairShare* share = sequence->share;
  CHECK(sequence->next_waiting == nullptr);
  if (share->waiting == 0) {
    Lift(share);
    waiting_[share->priority].push_back(share);
    share->first = sequence;
  } else {
    share->last->next_waiting = sequence;
  }
  share->last = sequence;
  ++share->waiting;
  ++size_;
}

Sequence* FairQueue::Next() const {
  for (size_t priority = kPriorities; priority-- > 0;) {
    const FairShare* next = nullptr;
    for (const FairShare* share : waiting_[priority]) {
      // Between equals, who came first.
      if (next == nullptr || share->service < next->service ||
          (share->service == next->service && share->first->arrival < next->first->arrival)) {
        next = share;
      }
    }
    if (next != nullptr) return next->first;
  }
  return nullptr;
}

void FairQueue::Remove(Sequence* sequence) {
  FairShare* share = sequence->share;
  Sequence* before = nullptr;
  Sequence* here = share->first;
  while (here != nullptr && here != sequence) before = std::exchange(here, here->next_waiting);
  CHECK(here == sequence);
  (before == nullptr ? share->first : before->next_waiting) = sequence->next_waiting;
  if (share->last == sequence) share->last = before;
  sequence->next_waiting = nullptr;
  --size_;
  if (--share->waiting > 0) return;
  std::vector<FairShare*>& shares = waiting_[share->priority];
  shares.erase(std::find(shares.begin(), shares.end(), share));
  if (shares.empty()) last_to_leave_[share->priority] = share;
}

Sequence* FairQueue::Find(uint64_t id) const {
  for (const auto& shares : waiting_) {
    for (const FairShare* share : shares) {
      for (Sequence* one = share->first; one != nullptr; one = one->next_waiting) {
        if (one->id == id) return one;
      }
    }
  }
  return nullptr;
}

void FairQueue::ForEach(const std::function<void(Sequence*)>& visit) const {
  for (const auto& shares : waiting_) {
    // Backwards, because a share whose last one is removed leaves the list.
    for (size_t i = shares.size(); i-- > 0;) {
      for (Sequence *one = shares[i]->first, *next = nullptr; one != nullptr; one = next) {
        next = one->next_waiting;
        visit(one);
      }
    }
  }
}

absl::Status FairQueue::CheckInvariants() const {
  int32_t total = 0;
  for (const auto& [key, share] : shares_) {
    int32_t count = 0;
    uint64_t arrival = 0;
    const Sequence* last = nullptr;
    for (const Sequence* one = share->first; one != nullptr; one = one->next_waiting) {
      ++count;
      last = one;
      if (one->share != share.get() || one->arrival <= arrival) {
        return absl::InternalError(absl::StrCat("sequence ", one->id, " waits out of order"));
      }
      arrival = one->arrival;
    }
    const auto& shares = waiting_[share->priority];
    const bool listed = std::find(shares.begin(), shares.end(), share.get()) != shares.end();
    if (count != share->waiting || listed != (count > 0) || last != share->last ||
        share->sequences < count) {
      return absl::InternalError(absl::StrCat("the share of \"", share->tenant, "\" is wrong"));
    }
    total += count;
  }
  return total == size_ ? absl::OkStatus() : absl::InternalError("the queue's size is wrong");
}

}  // namespace nibble::scheduling
