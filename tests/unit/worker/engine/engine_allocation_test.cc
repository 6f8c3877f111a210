#include "gtest/gtest.h"
#include "tests/support/allocation_count.h"
#include "tests/support/fake_executor.h"
#include "worker/engine/engine.h"

namespace nibble::engine {
namespace {

class CountingSink final : public Sink {
 public:
  void OnAdmitted(int32_t) override {}
  void OnTokens(std::span<const OutputToken> tokens) override { count += tokens.size(); }
  void OnFinished(const Finish&) override {}
  size_t count = 0;
};

TEST(EngineAllocationTest, DecodingAllocatesNothingOnceWarm) {
  const SteadyClock clock;
  step::EngineStats stats;
  testing::FakeExecutor executor({});
  const auto engine = Engine::Create({}, &executor, nullptr, &clock, &stats);
  const auto sink = std::make_shared<CountingSink>();
  for (uint64_t seed = 0; seed < 64; ++seed) {
    Request request;
    request.prompt = {1, 2, 3};
    request.seed = seed;
    request.max_tokens = 1000;
    ASSERT_TRUE(engine->Submit(std::move(request), sink).ok());
  }
  for (int i = 0; i < 20; ++i) ASSERT_TRUE(engine->RunStep().ok());
  const size_t allocations = testing::AllocationCount();
  const size_t tokens = sink->count;
  for (int i = 0; i < 500; ++i) ASSERT_TRUE(engine->RunStep().ok());
  EXPECT_EQ(sink->count - tokens, 500u * 64u);
  EXPECT_EQ(testing::AllocationCount(), allocations);
}

}  // namespace
}  // namespace nibble::engine
