// Pool and index together against a naive reference, which knows every block's contents as the
// whole list of tokens up to its end and never looks at a name.
#include <rapidcheck.h>

#include <algorithm>
#include <deque>
#include <map>
#include <set>

#include "gtest/gtest.h"
#include "worker/scheduling/block_pool.h"

namespace nibble::scheduling {
namespace {

// A prefix of whole blocks: whose, and one token for each of its blocks (a block repeats it).
struct Prefix {
  std::string salt;
  std::vector<int32_t> blocks;
  friend auto operator<=>(const Prefix&, const Prefix&) = default;
};

struct Holder {
  Prefix all;  // what it is going to hold
  PrefixOwner* owner = nullptr;
  std::vector<int32_t> blocks;
  size_t fed = 0;        // blocks launched
  size_t published = 0;  // and what follows them:
  BlockName name{};
  uint64_t serial = 0;
  uint64_t last_step = 0;
};

// One operation on both, then every promise is checked.
class PrefixRun {
 public:
  explicit PrefixRun(int32_t total)
      : total_(total), pool_(total, {.owner_share = 0.5}), contents_(static_cast<size_t>(total)) {
    for (int32_t block = 0; block < total; ++block) free_.push_back(block);
  }

  void Step() {
    switch (*rc::gen::inRange(0, 12)) {
      case 0:
      case 1:
        Admit();
        break;
      case 2:
        End(/*withdraw=*/*rc::gen::inRange(0, 8) == 0);  // else preempted, aborted or at its end
        break;
      case 3:
      case 4:
      case 5:
      case 6:
      case 7:
        LaunchStep();
        break;
      default:
        RetireStep();
    }
    Check();
  }
  [[nodiscard]] int hits() const { return hits_; }
  [[nodiscard]] int evictions() const { return evictions_; }

 private:
  // What the reference knows of a block with a name.
  struct Named {
    int32_t block;
    uint64_t serial;
    uint64_t before;
  };

  static std::array<int32_t, step::kBlockTokens> TokensOf(int32_t value) {
    std::array<int32_t, step::kBlockTokens> tokens{};
    tokens.fill(value);
    return tokens;
  }
  static Prefix Beginning(const Prefix& all, size_t blocks) {
    return {all.salt, {all.blocks.begin(), all.blocks.begin() + static_cast<int64_t>(blocks)}};
  }

  void Admit() {
    if (holders_.size() == 4) return End(/*withdraw=*/false);  // room for something to be cached
    Holder holder;
    holder.all.salt = *rc::gen::element<std::string>("a", "b");
    holder.all.blocks = *rc::gen::container<std::vector<int32_t>>(*rc::gen::inRange<size_t>(1, 6),
                                                                  rc::gen::inRange(0, 3));
    holder.owner = pool_.prefixes().Join(holder.all.salt);
    const std::vector<int32_t> expected = Known(holder.all);
    holder.blocks = Find(&holder);
    RC_ASSERT(holder.blocks == expected);
    for (size_t i = 0; i < holder.blocks.size(); ++i) {
      // The contents are what it is going to hold, token by token, and its own.
      RC_ASSERT(Content(holder.blocks[i]) == Beginning(holder.all, i + 1));
      TakeNamed(holder.blocks[i]);
      pool_.Hold(holder.blocks[i]);
    }
    hits_ += static_cast<int>(holder.blocks.size());
    holder.fed = holder.published = holder.blocks.size();
    const size_t missing = holder.all.blocks.size() - holder.blocks.size();
    std::vector<int32_t> got;
    const bool fits = missing <= free_.size() + cached_.size();
    RC_ASSERT(pool_.Allocate(static_cast<int32_t>(missing), &got) == fits);
    if (fits) {
      RC_ASSERT(got == TakeNew(missing));
      holder.blocks.insert(holder.blocks.end(), got.begin(), got.end());
    } else {
      holder.all.blocks.resize(holder.blocks.size());  // it makes do with what it found
    }
    for (const int32_t block : holder.blocks) ++holders_of_[block];
    holders_.push_back(std::move(holder));
  }

  // The longest run that the index admits to.
  std::vector<int32_t> Find(Holder* holder) {
    std::vector<int32_t> found;
    holder->name = holder->owner->root;
    for (const int32_t value : holder->all.blocks) {
      const auto tokens = TokensOf(value);
      const BlockName name = pool_.prefixes().NameAfter(holder->name, tokens);
      const int32_t block = pool_.prefixes().Find(
          {.name = name, .before = holder->serial, .owner = holder->owner, .tokens = tokens});
      if (block < 0) break;
      holder->name = name;
      holder->serial = pool_.prefixes().Serial(block);
      found.push_back(block);
    }
    return found;
  }

  // The same, by whole lists of tokens.
  std::vector<int32_t> Known(const Prefix& all) const {
    std::vector<int32_t> known;
    uint64_t before = 0;
    for (size_t count = 1; count <= all.blocks.size(); ++count) {
      const auto found = named_.find(Beginning(all, count));
      if (found == named_.end() || found->second.before != before) break;
      before = found->second.serial;
      known.push_back(found->second.block);
    }
    return known;
  }

  void TakeNamed(int32_t block) {
    std::erase(cached_, block);
    std::erase_if(quarantine_, [block](const auto& entry) { return entry.first == block; });
  }

  std::vector<int32_t> TakeNew(size_t count) {
    std::vector<int32_t> taken;
    while (taken.size() < count) {
      if (free_.empty()) {
        ++evictions_;
        Forget(cached_.front());
      }
      const int32_t block = free_.front();
      free_.pop_front();
      for (const auto& [step, blocks] : touched_) RC_ASSERT(!blocks.contains(block));
      last_step_of_[block] = 0;
      contents_[static_cast<size_t>(block)] = {};
      taken.push_back(block);
    }
    return taken;
  }

  void Forget(int32_t block) {
    std::erase_if(named_, [block](const auto& entry) { return entry.second.block == block; });
    if (std::erase(cached_, block) > 0) free_.push_back(block);
  }

  void LaunchStep() {
    if (touched_.size() == 2) return;
    const uint64_t step = ++launched_;
    std::set<int32_t>& blocks = touched_[step];
    for (Holder& holder : holders_) {
      if (*rc::gen::inRange(0, 3) == 0) continue;
      if (holder.fed < holder.blocks.size()) {
        const int32_t block = holder.blocks[holder.fed++];
        RC_ASSERT(holders_of_[block] == 1);  // nobody else may see it change
        contents_[static_cast<size_t>(block)] = Beginning(holder.all, holder.fed);
      }
      holder.last_step = step;
      filled_[step].emplace_back(holder.blocks, holder.fed);
      blocks.insert(holder.blocks.begin(), holder.blocks.end());
    }
  }

  void RetireStep() {
    if (touched_.empty()) return;
    const uint64_t step = touched_.begin()->first;
    touched_.erase(step);
    pool_.Retire(step);
    for (auto entry = quarantine_.begin(); entry != quarantine_.end();) {
      if (entry->second > step) {
        ++entry;
        continue;
      }
      const int32_t block = entry->first;
      entry = quarantine_.erase(entry);
      Rest(block);
    }
    for (Holder& holder : holders_) {
      for (const auto& [blocks, fed] : filled_[step]) {
        if (blocks == holder.blocks) Publish(&holder, std::min(fed, holder.fed));
      }
    }
    filled_.erase(step);
  }

  void Publish(Holder* holder, size_t end) {
    for (; holder->published < end; ++holder->published) {
      const size_t at = holder->published;
      const auto tokens = TokensOf(holder->all.blocks[at]);
      const BlockName name = pool_.prefixes().NameAfter(holder->name, tokens);
      const int32_t block = pool_.Publish(
          holder->blocks[at],
          {.name = name, .before = holder->serial, .owner = holder->owner, .tokens = tokens});
      const Prefix prefix = Beginning(holder->all, at + 1);
      const auto known = named_.find(prefix);
      if (known != named_.end() && known->second.before != holder->serial) {
        Forget(known->second.block);
      }
      const uint64_t serial = pool_.prefixes().Serial(block);
      const auto [entry, added] = named_.try_emplace(
          prefix, Named{.block = holder->blocks[at], .serial = serial, .before = holder->serial});
      RC_ASSERT(entry->second.block == block);
      RC_ASSERT(entry->second.serial == serial);
      RC_ASSERT(added == (block == holder->blocks[at]) || known != named_.end());
      holder->name = name;
      holder->serial = serial;
    }
  }

  void End(bool withdraw) {
    if (holders_.empty()) return;
    const auto at = *rc::gen::inRange<size_t>(0, holders_.size());
    Holder holder = std::move(holders_[at]);
    holders_.erase(holders_.begin() + static_cast<std::ptrdiff_t>(at));
    if (withdraw) {
      pool_.Withdraw(holder.blocks);
      for (const int32_t block : holder.blocks) Forget(block);
    }
    std::reverse(holder.blocks.begin(), holder.blocks.end());
    pool_.Free(holder.blocks, holder.last_step);
    for (const int32_t block : holder.blocks) {
      last_step_of_[block] = std::max(last_step_of_[block], holder.last_step);
      if (--holders_of_[block] > 0) continue;
      const bool in_flight = touched_.contains(last_step_of_[block]);
      if (in_flight) {
        quarantine_.emplace_back(block, last_step_of_[block]);
      } else {
        Rest(block);
      }
    }
    pool_.prefixes().Leave(holder.owner);
  }

  void Rest(int32_t block) {
    const auto named = std::find_if(named_.begin(), named_.end(), [block](const auto& entry) {
      return entry.second.block == block;
    });
    if (named == named_.end()) {
      free_.push_back(block);
      return;
    }
    cached_.push_back(block);
    const std::string& salt = Content(block).salt;
    if (!OthersThan(salt)) return;
    std::vector<int32_t> own;
    for (const int32_t one : cached_) {
      if (Content(one).salt == salt) own.push_back(one);
    }
    const auto most = static_cast<size_t>(std::max(1, total_ / 2));
    for (size_t i = 0; i + most < own.size(); ++i) Forget(own[i]);
  }

  bool OthersThan(const std::string& salt) const {
    return std::any_of(holders_.begin(), holders_.end(),
                       [&](const Holder& holder) { return holder.all.salt != salt; }) ||
           std::any_of(named_.begin(), named_.end(),
                       [&](const auto& entry) { return entry.first.salt != salt; });
  }

  const Prefix& Content(int32_t block) const { return contents_[static_cast<size_t>(block)]; }

  void Check() {
    const absl::Status status = pool_.CheckInvariants();
    if (!status.ok()) RC_FAIL(std::string(status.message()));
    int32_t used = 0;
    for (const auto& [block, count] : holders_of_) {
      RC_ASSERT(pool_.holders(block) == count);
      used += count > 0 ? 1 : 0;
    }
    RC_ASSERT(pool_.used() == used);
    RC_ASSERT(pool_.free() == static_cast<int32_t>(free_.size()));
    RC_ASSERT(pool_.cached() == static_cast<int32_t>(cached_.size()));
    RC_ASSERT(pool_.quarantined() == static_cast<int32_t>(quarantine_.size()));
    RC_ASSERT(pool_.free() + pool_.cached() + pool_.used() + pool_.quarantined() == total_);
  }

  int32_t total_;
  BlockPool pool_;
  std::vector<Holder> holders_;
  std::map<int32_t, int32_t> holders_of_;  // block → how many
  std::vector<Prefix> contents_;           // [block], as a device would have them
  std::map<Prefix, Named> named_;
  std::deque<int32_t> free_;
  std::vector<int32_t> cached_;                           // longest first
  std::vector<std::pair<int32_t, uint64_t>> quarantine_;  // block, last step
  std::map<int32_t, uint64_t> last_step_of_;              // block → step
  std::map<uint64_t, std::set<int32_t>> touched_;         // step in flight → its blocks
  // Step in flight → of each row the table and how many of its blocks are full afterwards.
  std::map<uint64_t, std::vector<std::pair<std::vector<int32_t>, size_t>>> filled_;
  uint64_t launched_ = 0;
  int hits_ = 0;
  int evictions_ = 0;
};

TEST(PrefixPoolTest, BehavesLikeTheNaiveReference) {
  int hits = 0;
  int evictions = 0;
  const bool passed = rc::check("pool and index", [&] {
    PrefixRun run(*rc::gen::inRange(1, 14));
    const int operations = *rc::gen::inRange(0, 4000);
    for (int i = 0; i < operations; ++i) run.Step();
    hits += run.hits();
    evictions += run.evictions();
  });
  EXPECT_TRUE(passed);
  EXPECT_GT(hits, 1000);  // it says something only if these happen
  EXPECT_GT(evictions, 300);
}

}  // namespace
}  // namespace nibble::scheduling
