#include "worker/scheduling/prefix_index.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/check.h"

namespace nibble::scheduling {

PrefixIndex::PrefixIndex(int32_t block_count, std::string_view key, std::string_view model)
    : namer_(key, model),
      entries_(static_cast<size_t>(block_count)),
      buckets_(std::bit_ceil(static_cast<size_t>(block_count) + 1), -1),
      links_(static_cast<size_t>(block_count)),
      owner_links_(static_cast<size_t>(block_count)) {}

PrefixOwner* PrefixIndex::Join(std::string_view salt) {
  const auto found = owners_.find(salt);
  PrefixOwner* owner = found == owners_.end() ? nullptr : found->second.get();
  if (owner == nullptr) {
    auto made = std::make_unique<PrefixOwner>();
    made->salt = salt;
    made->root = namer_.Root(salt);
    owner = made.get();
    owners_.emplace(owner->salt, std::move(made));
  }
  ++owner->sequences;
  return owner;
}

void PrefixIndex::Leave(PrefixOwner* owner) {
  CHECK(owner->sequences > 0);
  --owner->sequences;
  ForgetIfIdle(owner);
}

void PrefixIndex::ForgetIfIdle(PrefixOwner* owner) {
  if (owner->sequences + owner->blocks > 0) return;
  const auto found = owners_.find(owner->salt);
  CHECK(found != owners_.end());
  owners_.erase(found);
}

size_t PrefixIndex::BucketOf(const BlockName& name) const {
  uint64_t bits = 0;
  std::memcpy(&bits, name.data(), sizeof(bits));
  return bits & (buckets_.size() - 1);
}

int32_t PrefixIndex::FindName(const BlockName& name) const {
  int32_t block = buckets_[BucketOf(name)];
  while (block >= 0 && At(block).name != name) block = At(block).next;
  return block;
}

int32_t PrefixIndex::Find(const PrefixBlock& wanted) const {
  const int32_t block = FindName(wanted.name);
  if (block < 0) return -1;
  const Entry& entry = At(block);
  const bool same = entry.before == wanted.before && entry.owner == wanted.owner &&
                    std::equal(entry.tokens.begin(), entry.tokens.end(), wanted.tokens.begin());
  return same ? block : -1;
}

void PrefixIndex::Insert(int32_t block, const PrefixBlock& content) {
  Entry& entry = entries_[static_cast<size_t>(block)];
  CHECK(entry.serial == 0);
  int32_t& bucket = buckets_[BucketOf(content.name)];
  entry.name = content.name;
  entry.serial = ++serials_;
  entry.before = content.before;
  entry.owner = content.owner;
  std::copy(content.tokens.begin(), content.tokens.end(), entry.tokens.begin());
  entry.next = bucket;
  bucket = block;
  ++entry.owner->blocks;
}

void PrefixIndex::Erase(int32_t block) {
  Entry& entry = entries_[static_cast<size_t>(block)];
  CHECK(entry.serial != 0);
  int32_t* link = &buckets_[BucketOf(entry.name)];
  while (*link != block) link = &entries_[static_cast<size_t>(*link)].next;
  *link = entry.next;
  PrefixOwner* owner = entry.owner;
  entry.serial = 0;
  entry.owner = nullptr;
  --owner->blocks;
  ForgetIfIdle(owner);
}

void PrefixIndex::Rest(int32_t block) {
  CHECK(Has(block));
  resting_.Append(block, &links_);
  OwnerOf(block)->resting.Append(block, &owner_links_);
}

void PrefixIndex::Wake(int32_t block) {
  CHECK(Has(block));
  resting_.Remove(block, &links_);
  OwnerOf(block)->resting.Remove(block, &owner_links_);
}

absl::Status PrefixIndex::CheckInvariants() const {
  size_t named = 0;
  int32_t rest = 0;
  for (const auto& [salt, owner] : owners_) {
    named += static_cast<size_t>(owner->blocks);
    rest += owner->resting.size;
    if (owner->sequences + owner->blocks == 0 || owner->resting.size > owner->blocks) {
      return absl::InternalError("an owner's counts are wrong");
    }
  }
  for (int32_t block = 0; block < static_cast<int32_t>(entries_.size()); ++block) {
    if (!Has(block)) continue;
    --named;
    if (FindName(At(block).name) != block) {
      return absl::InternalError(absl::StrCat("block ", block, " is not found by its name"));
    }
  }
  if (named != 0) return absl::InternalError("owners have other blocks than there are");
  if (rest != resting_.size) return absl::InternalError("owners' resting blocks do not add up");
  int32_t walked = 0;
  for (int32_t block = resting_.first; block >= 0;
       block = links_[static_cast<size_t>(block)].after) {
    if (!Has(block)) return absl::InternalError(absl::StrCat("block ", block, " rests unnamed"));
    ++walked;
  }
  return walked == resting_.size ? absl::OkStatus() : absl::InternalError("resting is broken");
}

}  // namespace nibble::scheduling
