// What the scheduler finds in the prefix index, and what it leaves there.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "worker/scheduling/scheduler.h"

namespace nibble::scheduling {
namespace {

BlockTokens TokensOf(const Sequence& sequence, int32_t index) {
  return BlockTokens(
      sequence.tokens.data() + size_t{step::kBlockTokens} * static_cast<size_t>(index),
      step::kBlockTokens);
}

}  // namespace

// Names are made as far as somebody asks for them: a prompt without a hit costs one.
PrefixBlock Scheduler::PrefixOf(Sequence* sequence, int32_t index, uint64_t before) {
  std::vector<BlockName>& names = sequence->names;
  const auto at = static_cast<size_t>(index);
  const BlockTokens tokens = TokensOf(*sequence, index);
  CHECK(at <= names.size());
  if (at == names.size()) {
    const BlockName& name_before = at == 0 ? sequence->prefix_owner->root : names.back();
    names.push_back(pool_.prefixes().NameAfter(name_before, tokens));
  }
  return {.name = names[at], .before = before, .owner = sequence->prefix_owner, .tokens = tokens};
}

// Leaves in prefix_ the longest run of blocks that hold what its tokens begin with. A sequence that
// waits for room is asked about at every step: what was found for it the last time is taken again
// as far as those entries are still there, which their serials say, and only what follows is looked
// for.
void Scheduler::FindPrefix(Sequence* sequence, int32_t blocks_max) {
  const PrefixIndex& prefixes = pool_.prefixes();
  size_t known = 0;
  if (sequence->arrival == prefix_arrival_) {
    const size_t known_max = std::min(prefix_.size(), static_cast<size_t>(blocks_max));
    while (known < known_max && prefixes.Serial(prefix_[known]) == prefix_serials_[known]) ++known;
  }
  prefix_arrival_ = sequence->arrival;
  prefix_.resize(known);
  prefix_serials_.resize(known);
  if (sequence->prefix_owner == nullptr) return;
  uint64_t before = known == 0 ? 0 : prefix_serials_.back();
  for (auto index = static_cast<int32_t>(known); index < blocks_max; ++index) {
    ++prefix_lookups_;
    const int32_t block = prefixes.Find(PrefixOf(sequence, index, before));
    if (block < 0) return;
    before = prefixes.Serial(block);
    prefix_.push_back(block);
    prefix_serials_.push_back(before);
  }
}

// Names its blocks below position `computed`.
void Scheduler::PublishPrefix(Sequence* sequence, int32_t computed) {
  if (sequence->prefix_owner == nullptr || sequence->state != SequenceState::kRunning) return;
  const int32_t full = computed / step::kBlockTokens;
  if (full > sequence->published) PublishBlocks(sequence, sequence->published, full);
}

// Before it gives its blocks back. Those that had another's in their place may be alone by now.
void Scheduler::PublishAgain(Sequence* sequence) {
  if (sequence->has_twins) PublishBlocks(sequence, 0, sequence->published);
}

void Scheduler::PublishBlocks(Sequence* sequence, int32_t first, int32_t end) {
  // What they follow may have been another's, and gone since.
  if (first > 0 &&
      pool_.prefixes().Serial(sequence->published_block) != sequence->published_serial) {
    first = 0;
  }
  uint64_t before = first == 0 ? 0 : sequence->published_serial;
  for (int32_t index = first; index < end; ++index) {
    const int32_t own = sequence->blocks[static_cast<size_t>(index)];
    const int32_t block = pool_.Publish(own, PrefixOf(sequence, index, before));
    before = pool_.prefixes().Serial(block);
    sequence->has_twins |= block != own;
    sequence->published_block = block;
    sequence->published_serial = before;
  }
  sequence->published = end;
}

// What is not finite may come from any block that it has read.
void Scheduler::WithdrawPrefix(Sequence* sequence) {
  FindPrefix(sequence, static_cast<int32_t>(sequence->names.size()));
  pool_.Withdraw(prefix_);
  sequence->has_twins = false;
}

absl::Status Scheduler::CheckBlocks(const Sequence& sequence, std::vector<int32_t>* holders) const {
  const auto broken = [&sequence](absl::string_view what) {
    return absl::InternalError(absl::StrCat("sequence ", sequence.id, ": ", what));
  };
  const PrefixIndex& prefixes = pool_.prefixes();
  for (int32_t index = 0; index < static_cast<int32_t>(sequence.blocks.size()); ++index) {
    const int32_t block = sequence.blocks[static_cast<size_t>(index)];
    ++(*holders)[static_cast<size_t>(block)];
    const bool full = (index + 1) * step::kBlockTokens <= sequence.fed;
    if (pool_.holders(block) > 1 && !full) return broken("shares a block that it writes to");
    if (!prefixes.Has(block)) continue;
    if (!full) return broken("writes to a block that others may take");
    if (prefixes.OwnerOf(block) != sequence.prefix_owner) return broken("has another's block");
    const BlockTokens there = prefixes.TokensOf(block);
    if (!std::equal(there.begin(), there.end(), TokensOf(sequence, index).begin())) {
      return broken("has a block with other tokens");
    }
  }
  return absl::OkStatus();
}

}  // namespace nibble::scheduling
