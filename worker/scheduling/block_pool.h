// Who owns which KV block: sequences (used), steps that still run (quarantined), nobody but with
// contents that others may want (cached), or nobody (free).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "worker/scheduling/prefix_index.h"

namespace nibble::scheduling {

struct PrefixOptions {
  bool on = true;
  // Of all blocks: what blocks with one salt may stay cached while there are other salts.
  double owner_share = 0.5;
  std::string key = {};    // secret, of this process
  std::string model = {};  // identity of what computes the blocks
};

// Invariants:
// 1. Every block is in exactly one of free, cached, used and quarantined; the four counts add up
//    to total. A used block has at least one holder, the others have none.
// 2. A quarantined block becomes free or cached when the last step that may touch it has retired,
//    not before.
// 3. The order in which blocks are handed out depends only on the calls made: the block that has
//    been free longest goes first, cached ones only when none is free, the one that has been
//    cached longest first.
// 4. A cached block has a name in the index. Blocks with a name never change: whoever finds one
//    there may hold it too, be it cached, used or quarantined.
// Blocks do not know their holders; a caller that frees what it does not hold is stopped by a CHECK
// where that shows. One thread. Allocates memory after construction only for salts that it does not
// know.
class BlockPool {
 public:
  explicit BlockPool(int32_t block_count, const PrefixOptions& options = {});

  // Appends `count` blocks to *out, each with one holder and no name. False, and nothing happens,
  // when fewer are available.
  [[nodiscard]] bool Allocate(int32_t count, std::vector<int32_t>* out);

  // One more holder. REQUIRES: the block has a name.
  void Hold(int32_t block);

  // Each of these loses a holder. `last_step` is the last step launched in which that holder
  // touches them (0 = none); successive calls may name steps in any order. What stays cached is
  // handed out in this order.
  void Free(std::span<const int32_t> blocks, uint64_t last_step);

  // Every step up to and including `step` has retired.
  void Retire(uint64_t step);

  // Names a used block that is full and computed; no step in flight writes to it. The block that
  // has the name now: another one where the index knew one with these contents.
  int32_t Publish(int32_t block, const PrefixBlock& content);
  // Takes the names of those that have any: nobody finds them any more. Their holders keep them.
  void Withdraw(std::span<const int32_t> blocks);

  [[nodiscard]] PrefixIndex& prefixes() { return index_; }
  [[nodiscard]] const PrefixIndex& prefixes() const { return index_; }

  [[nodiscard]] int32_t total() const { return static_cast<int32_t>(blocks_.size()); }
  [[nodiscard]] int32_t free() const { return free_count_; }
  [[nodiscard]] int32_t cached() const { return index_.resting(); }
  [[nodiscard]] int32_t available() const { return free() + cached(); }
  [[nodiscard]] int32_t quarantined() const { return quarantine_.size; }
  [[nodiscard]] int32_t used() const { return total() - available() - quarantined(); }
  [[nodiscard]] int32_t holders(int32_t block) const { return At(block).holders; }
  [[nodiscard]] bool IsCached(int32_t block) const { return At(block).state == State::kCached; }

  // INTERNAL names the first invariant that does not hold. For tests.
  [[nodiscard]] absl::Status CheckInvariants() const;

 private:
  enum class State : uint8_t { kFree, kCached, kUsed, kQuarantined };
  struct Block {
    State state = State::kFree;
    int32_t holders = 0;
    uint64_t last_step = 0;  // that touches it, of those who held it since it was handed out
  };

  [[nodiscard]] const Block& At(int32_t block) const { return blocks_[static_cast<size_t>(block)]; }
  [[nodiscard]] Block& At(int32_t block) { return blocks_[static_cast<size_t>(block)]; }
  void Release(int32_t block);
  void AddFree(int32_t block);
  [[nodiscard]] int32_t TakeOne();
  void Forget(int32_t block);

  std::vector<Block> blocks_;
  PrefixIndex index_;
  int32_t owner_blocks_max_;
  std::vector<int32_t> free_ring_;  // [total], free_count_ entries from free_begin_ on, wrapping
  size_t free_begin_ = 0;
  int32_t free_count_ = 0;
  LinkedIds quarantine_;       // in the order of Free
  std::vector<IdLink> links_;  // of quarantine_, [block]
  uint64_t retired_ = 0;
};

}  // namespace nibble::scheduling
