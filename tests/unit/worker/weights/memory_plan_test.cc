#include "worker/weights/memory_plan.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tensor_files.h"
#include "tests/support/test_data.h"
#include "worker/weights/activation_plan.h"

namespace nibble::weights {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::unique_ptr<Checkpoint> Open(const std::string& name) {
  auto checkpoint =
      Checkpoint::Open(nibble::testing::SourceDir() + "/tests/data/model-specs/" + name);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  return checkpoint.ok() ? *std::move(checkpoint) : nullptr;
}

TEST(MemoryPlanTest, WeightsOfASmallModelByHand) {
  // hidden 64, ffn 96, 4 heads and 2 KV heads of 16, 256 tokens, 2 layers, all fp32, untied.
  const auto checkpoint = Open("llama");
  MemoryOptions options;
  options.numerics = Numerics::kExact;
  const auto plan = PlanMemory(*checkpoint, 1, options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const RankMemoryPlan& rank = plan->ranks[0];
  EXPECT_EQ(rank.embedding_bytes, 256 * 64 * 4);
  EXPECT_EQ(rank.layer_bytes, 2 * 4 * (128 * 64 + 64 * 64 + 192 * 64 + 64 * 96 + 2 * 64));
  EXPECT_EQ(rank.head_bytes, 4 * (256 * 64 + 64));
  EXPECT_EQ(rank.rope_bytes, 2 * 4 * 256 * 8);
  EXPECT_EQ(rank.weight_bytes,
            rank.embedding_bytes + rank.layer_bytes + rank.head_bytes + rank.rope_bytes);
  EXPECT_EQ(rank.kv_block_bytes, 2 * 2 * 2 * 16 * 16 * 4);
  EXPECT_EQ(plan->max_context, 256);
  EXPECT_EQ(plan->kv_blocks, 64 * 16);  // 64 sequences of 256 positions
  options.numerics = Numerics::kFast;
  EXPECT_EQ(PlanMemory(*checkpoint, 1, options)->ranks[0].kv_block_bytes, 2 * 2 * 2 * 16 * 16 * 2);
}

TEST(MemoryPlanTest, TheHeadIsInt8OnlyWhereThatIsMeant) {
  const struct {
    const char* folder;
    Numerics numerics;
    HeadFormat head;
    PackedKind kind;
  } cases[] = {
      {"qwen2", Numerics::kFast, HeadFormat::kInt8, PackedKind::kInt8},
      {"qwen2", Numerics::kFast, HeadFormat::kStored, PackedKind::kDense},
      {"qwen2", Numerics::kExact, HeadFormat::kInt8, PackedKind::kDense},
      {"llama-biases", Numerics::kFast, HeadFormat::kInt8, PackedKind::kInt8},
      {"llama", Numerics::kFast, HeadFormat::kInt8, PackedKind::kDense},  // fp32
      {"qwen2-awq-quantized-head", Numerics::kFast, HeadFormat::kInt8, PackedKind::kW4},
  };
  for (const auto& entry : cases) {
    const auto checkpoint = Open(entry.folder);
    const auto shares = PlanShares(*checkpoint, 1);
    MemoryOptions options;
    options.numerics = entry.numerics;
    options.head = entry.head;
    const auto format = HeadPackedFormat(*checkpoint, shares->at(0), options);
    ASSERT_TRUE(format.ok()) << format.status();
    EXPECT_EQ(format->kind, entry.kind) << entry.folder;
  }
}

TEST(MemoryPlanTest, BudgetsAreFilledAndNeverExceeded) {
  const auto checkpoint = Open("llama-awq-gemm");
  for (const int32_t ranks : {1, 3}) {
    MemoryOptions options;
    options.max_slots = 4;
    options.max_step_tokens = 32;
    options.memory_bytes = 8 << 20;
    const auto plan = PlanMemory(*checkpoint, ranks, options);
    ASSERT_TRUE(plan.ok()) << plan.status();
    bool filled = false;
    for (const RankMemoryPlan& rank : plan->ranks) {
      EXPECT_EQ(rank.kv_blocks, plan->kv_blocks);
      EXPECT_LE(rank.total_bytes(), options.memory_bytes);
      filled = filled || rank.total_bytes() + rank.kv_block_bytes > options.memory_bytes;
    }
    EXPECT_TRUE(filled);  // the smallest rank's count decides
  }
}

TEST(MemoryPlanTest, WhatCannotFitIsRefusedWithTheNumbers) {
  const auto checkpoint = Open("llama");
  MemoryOptions options;
  options.memory_bytes = 1 << 20;
  const auto plan = PlanMemory(*checkpoint, 2, options);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(
      std::string(plan.status().message()),
      AllOf(HasSubstr("rank 0 of 2 needs "), HasSubstr("weights "),
            HasSubstr("one sequence of 256 positions takes 16"), HasSubstr("the budget is 1MiB")));
  options.memory_bytes = 64 << 20;
  options.kv_blocks = 1 << 20;
  EXPECT_EQ(PlanMemory(*checkpoint, 2, options).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(MemoryPlanTest, StatedKvBlocksAreTaken) {
  MemoryOptions options;
  options.kv_blocks = 7;
  EXPECT_EQ(PlanMemory(*Open("llama"), 2, options)->kv_blocks, 7);
}

TEST(MemoryPlanTest, OptionsOutOfRangeAreNamed) {
  const auto checkpoint = Open("llama-rope-dynamic");
  MemoryOptions options;
  options.max_context = 64;  // a dynamic model may be stretched to factor times its length
  EXPECT_EQ(PlanMemory(*checkpoint, 1, options)->max_context, 64);
  options.max_context = 65;
  EXPECT_THAT(PlanMemory(*checkpoint, 1, options).status().ToString(),
              HasSubstr("max context is 65; allowed: 0 … 64"));
  options.max_context = 0;
  EXPECT_EQ(PlanMemory(*checkpoint, 1, options)->max_context, 32);
  options.max_slots = 0;
  EXPECT_THAT(PlanMemory(*checkpoint, 1, options).status().ToString(), HasSubstr("max slots is 0"));
  options.max_slots = 1;
  options.max_step_tokens = -1;
  EXPECT_FALSE(PlanMemory(*checkpoint, 1, options).ok());
  EXPECT_FALSE(PlanMemory(*checkpoint, 0, {}).ok());
}

TEST(MemoryPlanTest, AMissingTensorIsNamedBeforeAnythingIsLoaded) {
  namespace fs = std::filesystem;
  const std::string source =
      nibble::testing::SourceDir() + "/tests/data/model-specs/llama-awq-gemm";
  const auto file = SafetensorsFile::Open(source + "/model.safetensors");
  ASSERT_TRUE(file.ok());
  std::string root = fs::temp_directory_path() / "nibble-plan-XXXXXX";
  ASSERT_NE(mkdtemp(root.data()), nullptr);
  fs::copy(source + "/config.json", root);
  for (const auto& [left_out, view] : (*file)->tensors()) {
    std::vector<TestTensor> tensors;
    for (const auto& [name, kept] : (*file)->tensors()) {
      if (name == left_out) continue;
      const auto* bytes = reinterpret_cast<const char*>(kept.data.data());
      tensors.push_back({name, std::string(TensorTypeName(kept.type)), kept.shape,
                         std::string(bytes, kept.data.size())});
    }
    WriteAll(root + "/model.safetensors", FileOf(tensors));
    const auto checkpoint = Checkpoint::Open(root);
    ASSERT_TRUE(checkpoint.ok());
    const auto plan = PlanMemory(**checkpoint, 1, {});
    EXPECT_FALSE(plan.ok()) << left_out;
    const std::string layer = left_out.substr(0, left_out.rfind('.'));
    EXPECT_THAT(std::string(plan.status().message()), HasSubstr(layer));
  }
  fs::remove_all(root);
}

TEST(MemoryPlanTest, RealCheckpointFitsWhatItsHeadersSay) {
  const auto folder =
      nibble::testing::TestData("models/smollm2-135m-awq-gemm-g64", "MemoryPlanTest");
  if (!folder.has_value()) return;
  const auto checkpoint = Checkpoint::Open(*folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  for (const int32_t ranks : {1, 2, 3, 4}) {
    const auto plan = PlanMemory(**checkpoint, ranks, {});
    ASSERT_TRUE(plan.ok()) << plan.status();
    int64_t layers = 0;
    for (const RankMemoryPlan& rank : plan->ranks) layers += rank.layer_bytes;
    // 106 million 4-bit weights at 4.375 bits (fp16 scale, byte zero per 64) and fp32 norms.
    EXPECT_NEAR(static_cast<double>(layers), 106'168'320 * 4.375 / 8, 1.5e6 * ranks);
  }
}

}  // namespace
}  // namespace nibble::weights
