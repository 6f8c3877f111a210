#include "worker/weights/inspect.h"

#include <string>

#include "gtest/gtest.h"
#include "tests/support/test_data.h"

namespace nibble::weights {
namespace {

std::unique_ptr<Checkpoint> Open(const std::string& name) {
  auto checkpoint =
      Checkpoint::Open(nibble::testing::SourceDir() + "/tests/data/model-specs/" + name);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  return checkpoint.ok() ? *std::move(checkpoint) : nullptr;
}

TEST(InspectTest, ReportsStorageLayersAndDegrees) {
  const auto report = InspectCheckpoint(*Open("llama-awq-gemm"), {}, 8);
  ASSERT_TRUE(report.ok()) << report.status();
  ASSERT_EQ(report->files.size(), 1u);
  EXPECT_EQ(report->files[0].name, "model.safetensors");
  EXPECT_EQ(report->files[0].tensor_bytes, report->stored_bytes);
  ASSERT_EQ(report->storage.size(), 1u);
  EXPECT_EQ(report->storage[0].layout, Layout::kGemm);
  EXPECT_EQ(report->storage[0].group_size, 32);
  EXPECT_EQ(report->storage[0].linear_count, 14);
  const int64_t linears = 2 * (96 * 96 * 2 + 48 * 96 * 2 + 160 * 96 * 3);
  EXPECT_EQ(report->storage[0].weight_count, linears);
  EXPECT_EQ(report->parameter_count, linears + 256 * 96 + 5 * 96);
  ASSERT_EQ(report->layers.size(), 1u);
  EXPECT_EQ(report->layers[0].last_layer, 1);
  EXPECT_EQ(report->head.layout, Layout::kNone);

  ASSERT_EQ(report->degrees.size(), 6u);  // no more than query heads
  EXPECT_TRUE(report->degrees[0].possible.ok());
  EXPECT_TRUE(report->degrees[0].even);
  EXPECT_FALSE(report->degrees[2].even);  // 5 groups of FFN columns over 3 ranks
  EXPECT_EQ(report->degrees[2].weight_bytes.size(), 3u);
  EXPECT_FALSE(report->degrees[5].possible.ok());  // 5 groups, 6 ranks
  EXPECT_TRUE(report->degrees[5].kv_replicated);
}

TEST(InspectTest, EvenDegreesAreFound) {
  const auto report = InspectCheckpoint(*Open("qwen3"), {}, 4);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(report->degrees[1].even);
  EXPECT_FALSE(report->degrees[1].kv_replicated);
  EXPECT_FALSE(report->degrees[2].even);
  EXPECT_TRUE(report->degrees[3].kv_replicated);
}

TEST(InspectTest, PlansCountSequences) {
  MemoryOptions options;
  options.kv_blocks = 100;
  const auto report = ReportPlan(*Open("llama"), 2, options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->sequence_blocks, 16);
  EXPECT_EQ(report->sequences, 6);
  ASSERT_EQ(report->activations.size(), 2u);
  for (size_t rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(report->activations[rank].activation_bytes(),
              report->plan.ranks[rank].activation_bytes);
    EXPECT_EQ(report->activations[rank].workspace_bytes(),
              report->plan.ranks[rank].workspace_bytes);
  }
}

}  // namespace
}  // namespace nibble::weights
