// Which KV block holds which prefix.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "worker/scheduling/linked_ids.h"
#include "worker/scheduling/prefix_names.h"

namespace nibble::scheduling {

// Everybody who sends the same salt. Belongs to the index that made it.
struct PrefixOwner {
  std::string salt;
  BlockName root{};
  int32_t sequences = 0;  // that have joined and not left
  int32_t blocks = 0;     // with a name
  LinkedIds resting;      // those that nobody holds, the one to go first in front
};

// One block of a prefix, as it is looked for or published.
struct PrefixBlock {
  const BlockName& name;
  uint64_t before;  // serial of the entry of the block before it; 0 = it is the first one
  PrefixOwner* owner;
  BlockTokens tokens;
};

// An entry is found by name and believed only if owner, tokens and the entry before it are the
// same: by induction all tokens and the salt are, whatever the hash is worth. Serials are never
// used again, so an entry whose predecessor has gone is found by nobody until it is replaced.
// One thread. Allocates only for owners that it does not know.
class PrefixIndex {
 public:
  PrefixIndex(int32_t block_count, std::string_view key, std::string_view model);

  // The owner of a salt, which stays until Leave() and as long as blocks of it have names.
  [[nodiscard]] PrefixOwner* Join(std::string_view salt);
  void Leave(PrefixOwner* owner);
  [[nodiscard]] size_t owners() const { return owners_.size(); }

  [[nodiscard]] BlockName NameAfter(const BlockName& before, BlockTokens tokens) {
    return namer_.Next(before, tokens);
  }

  // The block that holds this, or -1.
  [[nodiscard]] int32_t Find(const PrefixBlock& wanted) const;
  // The block that has this name, or -1; what it holds may be something else.
  [[nodiscard]] int32_t FindName(const BlockName& name) const;
  // REQUIRES: neither the block nor the name is in the index.
  void Insert(int32_t block, const PrefixBlock& content);
  // REQUIRES: Has(block), and it does not rest.
  void Erase(int32_t block);

  [[nodiscard]] bool Has(int32_t block) const { return Serial(block) != 0; }
  // Of the block's entry; 0 = it has none.
  [[nodiscard]] uint64_t Serial(int32_t block) const { return At(block).serial; }
  [[nodiscard]] PrefixOwner* OwnerOf(int32_t block) const { return At(block).owner; }
  [[nodiscard]] BlockTokens TokensOf(int32_t block) const { return At(block).tokens; }

  // Blocks that nobody holds rest here, the one that has rested longest goes first.
  void Rest(int32_t block);
  void Wake(int32_t block);
  [[nodiscard]] int32_t resting() const { return resting_.size; }
  [[nodiscard]] int32_t LongestResting() const { return resting_.first; }

  // INTERNAL names what does not hold. For tests.
  [[nodiscard]] absl::Status CheckInvariants() const;

 private:
  struct Entry {
    BlockName name{};
    uint64_t serial = 0;  // 0 = the block has no name
    uint64_t before = 0;
    PrefixOwner* owner = nullptr;
    std::array<int32_t, step::kBlockTokens> tokens{};
    int32_t next = -1;  // in its bucket
  };

  [[nodiscard]] const Entry& At(int32_t block) const {
    return entries_[static_cast<size_t>(block)];
  }
  [[nodiscard]] size_t BucketOf(const BlockName& name) const;
  void ForgetIfIdle(PrefixOwner* owner);

  PrefixNamer namer_;
  std::unordered_map<std::string_view, std::unique_ptr<PrefixOwner>> owners_;  // keys: their salts
  std::vector<Entry> entries_;                                                 // [block]
  std::vector<int32_t> buckets_;  // first block of each, -1 = none; a power of two
  uint64_t serials_ = 0;
  LinkedIds resting_;
  std::vector<IdLink> links_;        // of resting_, [block]
  std::vector<IdLink> owner_links_;  // of PrefixOwner::resting, [block]
};

}  // namespace nibble::scheduling
