#include "worker/weights/machine_memory.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nibble::weights {
namespace {

using ::testing::HasSubstr;

MemoryPlan TwoRanks() {
  MemoryPlan plan;
  plan.kv_blocks = 10;
  for (int rank = 0; rank < 2; ++rank) {
    RankMemoryPlan of_rank;
    of_rank.weight_bytes = int64_t{100} << 20;
    of_rank.kv_block_bytes = int64_t{1} << 20;
    of_rank.activation_bytes = int64_t{5} << 20;
    of_rank.workspace_bytes = int64_t{5} << 20;
    plan.ranks.push_back(of_rank);
  }
  return plan;
}

TEST(MachineMemory, IsThatOfThisMachine) {
  EXPECT_GT(MachineMemory(), int64_t{64} << 20);
  EXPECT_LT(MachineMemory(), int64_t{1} << 50);
}

TEST(MachineMemory, AllRanksTogetherMustFit) {
  EXPECT_TRUE(CheckFits(TwoRanks(), int64_t{240} << 20).ok());
  const absl::Status status = CheckFits(TwoRanks(), (int64_t{240} << 20) - 1);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("needs 240MiB on 2 ranks: weights 200MiB, 10 KV blocks a rank 20MiB, the "
                        "rest 20MiB; this machine has 240.00MiB"));
}

}  // namespace
}  // namespace nibble::weights
