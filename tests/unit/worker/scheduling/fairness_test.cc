// What tenants are promised, on the real scheduler over the fake executor with random requests.
#include <algorithm>
#include <random>
#include <set>

#include "gtest/gtest.h"
#include "scheduler_bench.h"

namespace nibble::scheduling {
namespace {

constexpr int kTenantsMax = 5;

int32_t Between(std::mt19937_64& random, int32_t low, int32_t high) {
  return low + static_cast<int32_t>(random() % static_cast<uint64_t>(high - low + 1));
}

SchedulerOptions RandomOptions(std::mt19937_64& random, bool prefix_cache) {
  SchedulerOptions options;
  options.prefix.on = prefix_cache;
  options.limits = {.vocab_size = 50,
                    .max_context = 160,
                    .max_slots = Between(random, 1, 6),
                    .max_step_tokens = Between(random, 8, 64),
                    .kv_blocks = Between(random, 10, 40)};
  options.prefill_chunk_tokens = Between(random, 8, 64);
  return options;
}

// Requests of several tenants, with what each has been served so far.
class TenantBench {
 public:
  explicit TenantBench(uint64_t seed, bool prefix_cache = true)
      : random_(seed), options_(RandomOptions(random_, prefix_cache)), bench_(options_) {}

  explicit TenantBench(const SchedulerOptions& options)
      : random_(0), options_(options), bench_(options_) {}

  std::mt19937_64& random() { return random_; }
  const SchedulerOptions& options() const { return options_; }
  SchedulerBench& bench() { return bench_; }

  uint64_t Add(int tenant, int32_t prompt, int32_t max_tokens) {
    const uint64_t id = owners_.size() + 1;
    SequenceSpec spec = Spec(id, prompt, max_tokens);
    spec.tenant.assign(1, static_cast<char>('a' + tenant));
    owners_.push_back(tenant);
    prompts_.push_back(prompt);
    bench_.scheduler().Add(std::move(spec));
    return id;
  }
  uint64_t AddRandom(int tenant) {
    return Add(tenant, Between(random_, 1, 80), Between(random_, 1, 60));
  }

  // Weighted tokens that the tenant has been given, by the same count as the scheduler's own.
  uint64_t Served(int tenant) {
    uint64_t served = 0;
    for (size_t i = 0; i < owners_.size(); ++i) {
      if (owners_[i] != tenant) continue;
      const Outcome& outcome = bench_[i + 1];
      if (outcome.admitted) {
        served += kPromptWeight * static_cast<uint64_t>(prompts_[i] - outcome.cached_tokens);
      }
      served += kOutputWeight * outcome.tokens.size();
    }
    return served;
  }
  int Waiting(int tenant) {
    int waiting = 0;
    for (size_t i = 0; i < owners_.size(); ++i) {
      waiting += owners_[i] == tenant && !bench_[i + 1].admitted && !bench_[i + 1].ended;
    }
    return waiting;
  }

  // The paper's bound for two tenants of which each always has something waiting, with what is
  // still to come of a prompt's size and of everything that runs at once: as many tokens as there
  // are positions, and more where sequences share them.
  uint64_t Bound() const {
    int32_t running = options_.limits.kv_blocks * step::kBlockTokens;
    if (options_.prefix.on) running = std::max(running, options_.limits.max_slots * (80 + 60));
    return 2 *
           std::max<uint64_t>(kPromptWeight * 80, kOutputWeight * static_cast<uint64_t>(running));
  }

 private:
  std::mt19937_64 random_;
  SchedulerOptions options_;
  SchedulerBench bench_;
  std::vector<int> owners_;
  std::vector<int32_t> prompts_;
};

TEST(FairnessTest, TenantsThatAlwaysWaitGetEqualShares) {
  for (uint64_t seed = 0; seed < 80; ++seed) {
    TenantBench tenants(seed / 2, /*prefix_cache=*/seed % 2 == 0);
    const int count = Between(tenants.random(), 2, kTenantsMax);
    const int slots = tenants.options().limits.max_slots;  // that one step may give out
    // One asks for far more than the others, and in larger pieces.
    for (int i = 0; i < 60; ++i) tenants.Add(0, 80, 60);
    for (int turn = 0; turn < 1500; ++turn) {
      for (int tenant = 0; tenant < count; ++tenant) {
        while (tenants.Waiting(tenant) <= slots) tenants.AddRandom(tenant);
      }
      tenants.bench().Turn();
      if (turn % 50 != 0) continue;
      for (int a = 0; a < count; ++a) {
        for (int b = 0; b < count; ++b) {
          ASSERT_LE(tenants.Served(a), tenants.Served(b) + tenants.Bound())
              << "seed " << seed << ", turn " << turn << ": tenants " << a << " and " << b;
        }
      }
    }
  }
}

// However many requests a tenant has waiting, another's first one is next but for those that are
// level with it: until it is admitted the others are served no more than what already ran, and one
// request each.
TEST(FairnessTest, AFloodDelaysAnothersRequestByABoundedNumberOfTokens) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    TenantBench tenants(seed);
    const int flooders = Between(tenants.random(), 1, kTenantsMax - 1);
    for (int i = 0; i < 200; ++i) tenants.AddRandom(1 + i % flooders);
    const int pause = Between(tenants.random(), 0, 400);
    for (int turn = 0; turn < pause; ++turn) tenants.bench().Turn();
    const auto served = [&] {
      uint64_t sum = 0;
      for (int tenant = 1; tenant <= flooders; ++tenant) sum += tenants.Served(tenant);
      return sum;
    };
    const uint64_t before = served();
    const uint64_t id = tenants.AddRandom(0);
    while (!tenants.bench()[id].admitted) {
      ASSERT_TRUE(tenants.bench().Turn());
    }
    const auto one_each =
        static_cast<uint64_t>(flooders) * (kPromptWeight * 80 + kOutputWeight * 60);
    const auto running =
        static_cast<uint64_t>(tenants.options().limits.max_slots) * kOutputWeight * 60;
    ASSERT_LE(served() - before, one_each + running) << "seed " << seed;
  }
}

// How many requests of `small` are admitted for each of `large`, with one slot and both waiting.
// All their prompts begin alike.
double AdmittedForEach(std::pair<int32_t, int32_t> large, std::pair<int32_t, int32_t> small,
                       bool prefix_cache) {
  SchedulerOptions options;
  options.prefix.on = prefix_cache;
  options.limits = {
      .vocab_size = 50, .max_context = 160, .max_slots = 1, .max_step_tokens = 64, .kv_blocks = 10};
  TenantBench tenants(options);
  for (int i = 0; i < 400; ++i) {
    if (i < 20) tenants.Add(0, large.first, large.second);
    tenants.Add(1, small.first, small.second);
  }
  while (tenants.Waiting(0) > 0) tenants.bench().Turn();
  return (400 - tenants.Waiting(1)) / 20.0;
}

TEST(FairnessTest, ATokenOfAPromptCountsOnceAndAGeneratedOneTwice) {
  EXPECT_NEAR(AdmittedForEach({80, 1}, {8, 1}, false), 82 / 10.0, 0.6);
  EXPECT_NEAR(AdmittedForEach({10, 40}, {10, 1}, false), 90 / 12.0, 0.6);
}

TEST(FairnessTest, WhatIsCachedCountsNothing) {
  EXPECT_NEAR(AdmittedForEach({80, 1}, {8, 1}, true), 18 / 10.0, 0.4);  // 64 of 80 are cached
}

TEST(FairnessTest, NobodyStarvesAndNothingIsLost) {
  for (uint64_t seed = 0; seed < 100; ++seed) {
    TenantBench tenants(seed);
    std::vector<uint64_t> ids;
    for (int turn = 0; turn < 300; ++turn) {
      if (tenants.random()() % 3 == 0) {
        ids.push_back(tenants.AddRandom(Between(tenants.random(), 0, kTenantsMax)));
      }
      if (tenants.random()() % 16 == 0 && !ids.empty()) {
        tenants.bench().scheduler().Cancel(ids[tenants.random()() % ids.size()]);
        tenants.bench().TakeEvents();
      }
      tenants.bench().Turn();
    }
    tenants.bench().RunToEnd();
    for (const uint64_t id : ids) ASSERT_TRUE(tenants.bench()[id].ended) << "seed " << seed;
  }
}

// A tenant alone, or requests of nobody in particular, go in the order in which they came.
TEST(FairnessTest, OneTenantIsServedInOrder) {
  TenantBench tenants(7);
  std::vector<uint64_t> ids;
  for (int i = 0; i < 50; ++i) ids.push_back(tenants.AddRandom(3));
  std::set<uint64_t> admitted;
  while (tenants.bench().Turn()) {
    for (const uint64_t id : ids) {
      if (!tenants.bench()[id].admitted || !admitted.insert(id).second) continue;
      ASSERT_EQ(admitted.size(), id);
    }
  }
}

}  // namespace
}  // namespace nibble::scheduling
