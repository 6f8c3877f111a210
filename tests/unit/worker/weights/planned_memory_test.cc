// What a plan says from headers alone is what an executor then allocates, byte for byte.
#include <string>
#include <utility>

#include "gtest/gtest.h"
#include "tests/support/test_data.h"
#include "worker/execution/cpu/local_group.h"
#include "worker/weights/checkpoint.h"

namespace nibble::weights {
namespace {

void ExpectPlanned(const std::string& folder, const execution::LocalGroup::Options& options) {
  SCOPED_TRACE(folder + " ranks " + std::to_string(options.ranks) + " threads " +
               std::to_string(options.threads));
  const auto checkpoint = Checkpoint::Open(folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto group = execution::LocalGroup::Create(**checkpoint, options);
  ASSERT_TRUE(group.ok()) << group.status();
  for (int32_t rank = 0; rank < options.ranks; ++rank) {
    const execution::MemoryUse use = (*group)->rank(rank).memory_use();
    const RankMemoryPlan& plan = (*group)->plan().ranks[static_cast<size_t>(rank)];
    EXPECT_EQ(use.weights, plan.weight_bytes);
    EXPECT_EQ(use.kv_cache, plan.kv_block_bytes * plan.kv_blocks);
    EXPECT_EQ(use.activations, plan.activation_bytes);
    EXPECT_EQ(use.workspace, plan.workspace_bytes);
  }
}

TEST(PlannedMemoryTest, IsWhatTheExecutorAllocates) {
  const std::string root = nibble::testing::SourceDir() + "/tests/data/model-specs/";
  for (const char* name :
       {"llama", "llama-biases", "qwen2", "qwen3", "llama-awq-gemm", "qwen2-awq-quantized-head"}) {
    for (const int32_t ranks : {1, 2}) {
      for (const auto& [numerics, head] : {std::pair{Numerics::kFast, HeadFormat::kInt8},
                                           std::pair{Numerics::kFast, HeadFormat::kStored},
                                           std::pair{Numerics::kExact, HeadFormat::kStored}}) {
        execution::LocalGroup::Options options;
        options.ranks = name == std::string("llama-awq-gemm") && ranks == 2 ? 3 : ranks;
        options.threads = ranks;
        options.memory.threads = ranks;
        options.memory.numerics = numerics;
        options.memory.head = head;
        options.memory.max_slots = 3;
        options.memory.max_step_tokens = ranks == 1 ? 2 : 33;
        options.memory.kv_blocks = 5;
        ExpectPlanned(root + name, options);
      }
    }
  }
}

TEST(PlannedMemoryTest, HoldsForARealCheckpoint) {
  const auto folder =
      nibble::testing::TestData("models/smollm2-135m-awq-gemm-g64", "PlannedMemoryTest");
  if (!folder.has_value()) return;
  execution::LocalGroup::Options options;
  options.memory.kv_blocks = 16;
  ExpectPlanned(*folder, options);
}

}  // namespace
}  // namespace nibble::weights
