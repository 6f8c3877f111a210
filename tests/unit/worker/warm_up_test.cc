#include "worker/warm_up.h"

#include <gtest/gtest.h>

#include "tests/support/fake_executor.h"

namespace nibble::worker {
namespace {

using nibble::testing::FakeExecutor;
using nibble::testing::FakeExecutorOptions;

class WarmUpTest : public ::testing::Test {
 protected:
  FakeExecutorOptions Options() {
    FakeExecutorOptions options;
    options.clock = &clock_;
    options.sleep_until = [this](Deadline until) { clock_.Advance(until - clock_.Now()); };
    return options;
  }
  ManualClock clock_;
};

TEST_F(WarmUpTest, LeavesTheExecutorAsItFoundIt) {
  FakeExecutor executor(Options());
  const auto result = WarmUp(&executor, nullptr, clock_, {});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_TRUE(executor.violation().ok()) << executor.violation();
  EXPECT_EQ(executor.open_slots(), 0);
  EXPECT_EQ(result->prefill_chunk_tokens, 512);  // a fast machine is bounded by the limit
}

TEST_F(WarmUpTest, TheChunkTakesAboutASecondAtTheMeasuredRate) {
  FakeExecutorOptions options = Options();
  options.step_per_token = std::chrono::milliseconds(5);
  FakeExecutor executor(options);
  const auto result = WarmUp(&executor, nullptr, clock_, {});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_DOUBLE_EQ(result->prefill_tokens_per_second, 200);
  EXPECT_EQ(result->prefill_chunk_tokens, 192);  // whole blocks
  const auto half =
      WarmUp(&executor, nullptr, clock_, {.chunk_time = std::chrono::milliseconds(500)});
  ASSERT_TRUE(half.ok()) << half.status();
  EXPECT_EQ(half->prefill_chunk_tokens, 96);
}

TEST_F(WarmUpTest, AMachineTooSlowForOneBlockASecondStillGetsOneBlock) {
  FakeExecutorOptions options = Options();
  options.step_per_token = std::chrono::seconds(1);
  FakeExecutor executor(options);
  const auto result = WarmUp(&executor, nullptr, clock_, {});
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->prefill_chunk_tokens, 16);
}

TEST_F(WarmUpTest, FitsTheSmallestLimits) {
  for (const int32_t context : {1, 2, 15, 16, 17, 33}) {
    FakeExecutorOptions options = Options();
    options.limits = {.vocab_size = 5,
                      .max_context = context,
                      .max_slots = 1,
                      .max_step_tokens = 8,
                      .kv_blocks = (context + 15) / 16};
    FakeExecutor executor(options);
    const auto result = WarmUp(&executor, nullptr, clock_, {});
    ASSERT_TRUE(result.ok()) << context << ": " << result.status();
    EXPECT_LE(result->prefill_chunk_tokens, 8);
  }
}

TEST_F(WarmUpTest, RefusesAModelWhoseLogitsAreNotFinite) {
  FakeExecutor executor(Options(), {.non_finite = [](uint64_t, int32_t) { return true; }});
  EXPECT_EQ(WarmUp(&executor, nullptr, clock_, {}).status().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace nibble::worker
