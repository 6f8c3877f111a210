#include "worker/scheduling/fair_queue.h"

#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace nibble::scheduling {
namespace {

class FairQueueTest : public ::testing::Test {
 protected:
  Sequence* Add(const std::string& tenant, Priority priority = Priority::kNormal) {
    Sequence& sequence = store_.emplace_back();
    sequence.id = sequence.arrival = store_.size();
    queue_.Join(tenant, priority, &sequence);
    queue_.Push(&sequence);
    EXPECT_EQ(queue_.CheckInvariants(), absl::OkStatus());
    return &sequence;
  }

  // The tenant that is served next, and that much.
  std::string Serve(uint64_t weighted_tokens) {
    Sequence* sequence = queue_.Next();
    queue_.Remove(sequence);
    FairQueue::Charge(sequence, weighted_tokens);
    const std::string tenant = sequence->share->tenant;
    queue_.Leave(sequence);
    EXPECT_EQ(queue_.CheckInvariants(), absl::OkStatus());
    return tenant;
  }

  std::deque<Sequence> store_;
  FairQueue queue_;
};

TEST_F(FairQueueTest, TheTenantThatWasServedLeastIsNext) {
  for (int i = 0; i < 3; ++i) Add("a");
  for (int i = 0; i < 3; ++i) Add("b");
  EXPECT_EQ(Serve(10), "a");  // equals: who came first
  EXPECT_EQ(Serve(4), "b");
  EXPECT_EQ(Serve(4), "b");
  EXPECT_EQ(Serve(4), "b");
  EXPECT_EQ(Serve(1), "a");
}

TEST_F(FairQueueTest, WithinATenantTheFirstIsFirst) {
  Sequence* first = Add("a");
  Sequence* second = Add("a");
  Sequence* third = Add("a");
  EXPECT_EQ(queue_.Next(), first);
  queue_.Remove(second);
  queue_.Remove(first);
  EXPECT_EQ(queue_.Next(), third);
  Sequence* fourth = Add("a");
  queue_.Remove(third);
  EXPECT_EQ(queue_.Next(), fourth);
}

TEST_F(FairQueueTest, APauseSavesNothingUp) {
  for (int i = 0; i < 20; ++i) Add("busy");
  for (int i = 0; i < 10; ++i) Serve(100);
  for (int i = 0; i < 10; ++i) Add("back");
  int back = 0;
  for (int i = 0; i < 10; ++i) back += Serve(100) == "back";
  EXPECT_EQ(back, 5);  // not the ten that it would have had to its name
}

TEST_F(FairQueueTest, AnEmptyQueueRemembersWhereItStood) {
  Add("old");
  Serve(1000);
  for (int i = 0; i < 3; ++i) Add("new");  // nobody waits: level with the last that did
  for (int i = 0; i < 3; ++i) Add("old");
  EXPECT_EQ(Serve(10), "new");
  EXPECT_EQ(Serve(10), "old");
  EXPECT_EQ(Serve(10), "new");
}

TEST_F(FairQueueTest, AHigherClassGoesFirstWhateverItHasHad) {
  Add("a", Priority::kLow);
  Add("a", Priority::kNormal);
  Add("a", Priority::kHigh);
  Add("b", Priority::kHigh);
  std::vector<size_t> order;
  while (const Sequence* next = queue_.Next()) {
    order.push_back(next->share->priority);
    Serve(1000);
  }
  EXPECT_EQ(order, (std::vector<size_t>{2, 2, 1, 0}));
}

TEST_F(FairQueueTest, TenantsThatHoldNothingAreForgotten) {
  for (int i = 0; i < 5000; ++i) {
    Add(std::to_string(i));
    Serve(1);
  }
  int kept = 0;
  queue_.ForEach([&](Sequence*) { ++kept; });
  EXPECT_EQ(kept, 0);
  EXPECT_LE(queue_.shares(), 1025u);
}

TEST_F(FairQueueTest, FindsAndVisitsWhatWaits) {
  Add("a");
  Sequence* b = Add("b", Priority::kHigh);
  Add("a");
  EXPECT_EQ(queue_.Find(b->id), b);
  EXPECT_EQ(queue_.Find(99), nullptr);
  int visited = 0;
  queue_.ForEach([&](Sequence* sequence) {
    ++visited;
    queue_.Remove(sequence);
  });
  EXPECT_EQ(visited, 3);
  EXPECT_EQ(queue_.size(), 0);
  EXPECT_EQ(queue_.CheckInvariants(), absl::OkStatus());
}

// Tenants that always have something waiting get equal service whatever their requests' sizes, to
// within one request.
TEST_F(FairQueueTest, BackloggedTenantsAreServedEqually) {
  for (uint64_t seed = 0; seed < 50; ++seed) {
    std::mt19937_64 random(seed);
    queue_ = FairQueue();
    store_.clear();
    const size_t tenants = 2 + random() % 6;
    const uint64_t largest = 1 + random() % 1000;
    std::map<std::string, uint64_t> served;
    for (size_t i = 0; i < tenants; ++i) {
      for (int n = 0; n < 2; ++n) Add(std::to_string(i));
    }
    for (int i = 0; i < 500; ++i) {
      const uint64_t size = 1 + random() % largest;
      const std::string tenant = Serve(size);
      served[tenant] += size;
      Add(tenant);
    }
    for (const auto& [a, of_a] : served) {
      for (const auto& [b, of_b] : served) {
        ASSERT_LE(of_a, of_b + largest) << "seed " << seed << ": " << a << " and " << b;
      }
    }
  }
}

}  // namespace
}  // namespace nibble::scheduling
