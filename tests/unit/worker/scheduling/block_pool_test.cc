#include "worker/scheduling/block_pool.h"

#include <rapidcheck.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <map>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nibble::scheduling {
namespace {

using ::testing::ElementsAre;

std::vector<int32_t> Take(BlockPool* pool, int32_t count) {
  std::vector<int32_t> blocks;
  EXPECT_TRUE(pool->Allocate(count, &blocks));
  return blocks;
}

TEST(BlockPoolTest, HandsOutTheBlockThatHasBeenFreeLongest) {
  BlockPool pool(4);
  EXPECT_THAT(Take(&pool, 3), ElementsAre(0, 1, 2));
  pool.Free(std::vector<int32_t>{2}, 0);
  pool.Free(std::vector<int32_t>{0}, 0);
  EXPECT_THAT(Take(&pool, 3), ElementsAre(3, 2, 0));
}

TEST(BlockPoolTest, GivesAllOrNothing) {
  BlockPool pool(3);
  std::vector<int32_t> blocks = {7};
  EXPECT_FALSE(pool.Allocate(4, &blocks));
  EXPECT_THAT(blocks, ElementsAre(7));
  EXPECT_EQ(pool.free(), 3);
  EXPECT_TRUE(pool.Allocate(3, &blocks));
  EXPECT_THAT(blocks, ElementsAre(7, 0, 1, 2));
  EXPECT_FALSE(pool.Allocate(1, &blocks));
  EXPECT_TRUE(pool.Allocate(0, &blocks));
}

TEST(BlockPoolTest, ABlockRestsUntilTheLastStepThatMayTouchItHasRetired) {
  BlockPool pool(2);
  const std::vector<int32_t> blocks = Take(&pool, 2);
  pool.Free(std::vector<int32_t>{0}, 5);
  pool.Free(std::vector<int32_t>{1}, 4);
  EXPECT_EQ(pool.quarantined(), 2);
  std::vector<int32_t> none;
  EXPECT_FALSE(pool.Allocate(1, &none));
  pool.Retire(3);
  EXPECT_FALSE(pool.Allocate(1, &none));
  pool.Retire(4);
  EXPECT_THAT(Take(&pool, 1), ElementsAre(1));
  pool.Retire(5);
  EXPECT_THAT(Take(&pool, 1), ElementsAre(0));
  pool.Free(std::vector<int32_t>{0}, 5);  // that step has retired already
  EXPECT_EQ(pool.free(), 1);
}

TEST(BlockPoolTest, AStepThatRetiresTakesTheOnesBeforeItAlong) {
  BlockPool pool(2);
  const std::vector<int32_t> blocks = Take(&pool, 2);
  pool.Free({blocks.data(), 1}, 1);
  pool.Free({blocks.data() + 1, 1}, 2);
  pool.Retire(3);
  EXPECT_EQ(pool.free(), 2);
  EXPECT_EQ(pool.CheckInvariants(), absl::OkStatus());
}

TEST(BlockPoolDeathTest, ADoubleFreeIsOurMistake) {
  BlockPool pool(2);
  const std::vector<int32_t> blocks = Take(&pool, 1);
  pool.Free(blocks, 0);
  EXPECT_DEATH(pool.Free(blocks, 0), "freed twice");
  EXPECT_DEATH(pool.Free(std::vector<int32_t>{9}, 0), "CHECK|total");
}

// What the pool promises, said as plainly as possible: owners, quarantine and free order as sets
// and lists of whole blocks.
struct Model {
  explicit Model(int32_t total) {
    for (int32_t block = 0; block < total; ++block) free.push_back(block);
  }
  std::deque<int32_t> free;
  std::map<int32_t, std::vector<int32_t>> holders;       // holder → blocks
  std::vector<std::pair<int32_t, uint64_t>> quarantine;  // block, last step; oldest first
  std::set<uint64_t> in_flight;                          // steps launched and not retired
  std::map<uint64_t, std::set<int32_t>> touched;         // step → blocks that it may touch
  uint64_t launched = 0;
};

// One random operation on both, then every promise is checked.
class PoolRun {
 public:
  explicit PoolRun(int32_t total) : total_(total), pool_(total), model_(total) {}

  void Step() {
    switch (*rc::gen::inRange(0, 6)) {
      case 0:
      case 1:
        Allocate();
        break;
      case 2:
        FreeAll();
        break;
      case 3:
        FreeOne();
        break;
      case 4:
        Launch();
        break;
      default:
        Retire();
    }
    Check();
  }

 private:
  void Allocate() {
    const int32_t holder = *rc::gen::inRange(0, 5);
    const int32_t count = *rc::gen::inRange(0, total_ + 2);
    std::vector<int32_t> got;
    const bool fits = count <= static_cast<int32_t>(model_.free.size());
    RC_ASSERT(pool_.Allocate(count, &got) == fits);
    if (!fits) {
      RC_ASSERT(got.empty());
      return;
    }
    for (const int32_t block : got) {
      RC_ASSERT(block == model_.free.front());  // deterministic order
      for (const uint64_t step : model_.in_flight) {
        RC_ASSERT(!model_.touched[step].contains(block));
      }
      model_.free.pop_front();
      model_.holders[holder].push_back(block);
    }
  }

  // The last step in flight that may touch one of these, 0 when none.
  uint64_t LastStepOf(const std::vector<int32_t>& blocks) {
    uint64_t last = 0;
    for (const uint64_t step : model_.in_flight) {
      for (const int32_t block : blocks) {
        if (model_.touched[step].contains(block)) last = std::max(last, step);
      }
    }
    return last;
  }

  void Give(const std::vector<int32_t>& blocks) {
    const uint64_t last = LastStepOf(blocks);
    pool_.Free(blocks, last);
    for (const int32_t block : blocks) {
      if (last == 0) {
        model_.free.push_back(block);
      } else {
        model_.quarantine.emplace_back(block, last);
      }
    }
  }

  void FreeAll() {
    if (model_.holders.empty()) return;
    const auto at = *rc::gen::inRange<size_t>(0, model_.holders.size());
    const auto holder = std::next(model_.holders.begin(), static_cast<std::ptrdiff_t>(at));
    Give(holder->second);
    model_.holders.erase(holder);
  }

  void FreeOne() {
    if (model_.holders.empty()) return;
    std::vector<int32_t>& blocks = model_.holders.begin()->second;
    if (blocks.empty()) return;
    const std::vector<int32_t> one = {blocks.back()};
    blocks.pop_back();
    Give(one);
  }

  void Launch() {
    if (model_.in_flight.size() == 2) return;
    const uint64_t step = ++model_.launched;
    model_.in_flight.insert(step);
    for (const auto& [holder, blocks] : model_.holders) {
      if (*rc::gen::arbitrary<bool>()) model_.touched[step].insert(blocks.begin(), blocks.end());
    }
  }

  void Retire() {
    if (model_.in_flight.empty()) return;
    const uint64_t step = *model_.in_flight.begin();
    model_.in_flight.erase(step);
    pool_.Retire(step);
    std::erase_if(model_.quarantine, [&](const std::pair<int32_t, uint64_t>& entry) {
      if (entry.second > step) return false;
      model_.free.push_back(entry.first);
      return true;
    });
  }

  void Check() {
    const absl::Status status = pool_.CheckInvariants();
    if (!status.ok()) RC_FAIL(std::string(status.message()));
    size_t used = 0;
    for (const auto& [holder, blocks] : model_.holders) used += blocks.size();
    RC_ASSERT(pool_.free() == static_cast<int32_t>(model_.free.size()));
    RC_ASSERT(pool_.quarantined() == static_cast<int32_t>(model_.quarantine.size()));
    RC_ASSERT(pool_.used() == static_cast<int32_t>(used));
    RC_ASSERT(pool_.free() + pool_.used() + pool_.quarantined() == total_);
  }

  int32_t total_;
  BlockPool pool_;
  Model model_;
};

TEST(BlockPoolTest, BehavesLikeTheNaiveModel) {
  // RapidCheck prints the seed and the shrunk case of a failure; RC_PARAMS repeats it.
  const bool passed = rc::check("block pool", [] {
    PoolRun run(*rc::gen::inRange(1, 12));
    const int operations = *rc::gen::inRange(0, 2000);
    for (int i = 0; i < operations; ++i) run.Step();
  });
  EXPECT_TRUE(passed);
}

}  // namespace
}  // namespace nibble::scheduling
