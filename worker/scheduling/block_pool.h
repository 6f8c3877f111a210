// Who owns which KV block: nobody (free), a sequence (used), or steps that still run (quarantined).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/status.h"

namespace nibble::scheduling {

// Invariants:
// 1. Every block is in exactly one of free, used and quarantined; the three counts add up to total.
// 2. A quarantined block becomes free when the last step that may touch it has retired, not before.
// 3. The order in which blocks are handed out depends only on the calls made: the block that has
//    been free longest goes first.
// Blocks do not know their owners; a caller that frees what it does not own is stopped by a CHECK
// where that shows. One thread. Allocates no memory after construction.
class BlockPool {
 public:
  explicit BlockPool(int32_t block_count);

  // Appends `count` blocks to *out. False, and nothing happens, when fewer are free.
  [[nodiscard]] bool Allocate(int32_t count, std::vector<int32_t>* out);

  // Takes used blocks back. `last_step` is the last step launched that may touch them (0 = none);
  // successive calls may name steps in any order.
  void Free(std::span<const int32_t> blocks, uint64_t last_step);

  // Every step up to and including `step` has retired.
  void Retire(uint64_t step);

  [[nodiscard]] int32_t total() const { return static_cast<int32_t>(states_.size()); }
  [[nodiscard]] int32_t free() const { return free_count_; }
  [[nodiscard]] int32_t quarantined() const { return static_cast<int32_t>(quarantine_.size()); }
  [[nodiscard]] int32_t used() const { return total() - free() - quarantined(); }

  // INTERNAL names the first invariant that does not hold. For tests.
  [[nodiscard]] absl::Status CheckInvariants() const;

 private:
  enum class State : uint8_t { kFree, kUsed, kQuarantined };
  struct Waiting {
    int32_t block;
    uint64_t last_step;
  };

  void Release(int32_t block);

  std::vector<State> states_;       // [block]
  std::vector<int32_t> free_ring_;  // [total], free_count_ entries from free_begin_ on, wrapping
  size_t free_begin_ = 0;
  int32_t free_count_ = 0;
  std::vector<Waiting> quarantine_;  // in the order of Free
  uint64_t retired_ = 0;
};

}  // namespace nibble::scheduling
