#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "worker/execution/cuda/gpu_rank.h"
#include "worker/model/known_shapes.h"

namespace nibble::execution {
namespace {

using ::testing::HasSubstr;

GpuModelSource Shape(const char* name) {
  const auto shape = model::FindKnownShape(name);
  return {.checkpoint = nullptr, .spec = shape->spec, .group = shape->group};
}

GpuInfo Gpu(int64_t free_bytes) {
  GpuInfo info;
  info.ordinal = 3;
  info.name = "a GPU";
  info.total_bytes = info.free_bytes = free_bytes;
  return info;
}

weights::MemoryPlan Plan(const char* shape, int32_t ranks, const GpuPlanOptions& options) {
  auto plan = PlanGpuMemory(Shape(shape), ranks, options);
  EXPECT_TRUE(plan.ok()) << plan.status();
  return plan.ok() ? *std::move(plan) : weights::MemoryPlan{};
}

// 6.979e9 weights of 4.25 bits, embedding and head of 32000 x 4096 fp16, 128 KiB of KV a position.
TEST(GpuPlan, MistralsWeightsAndBlocksAreWhatItsShapeSays) {
  const auto plan = Plan("mistral-7b", 1, {.memory = {.max_context = 2048}});
  const weights::RankMemoryPlan& rank = plan.ranks.at(0);
  const double linear = 6.979e9 * 4.25 / 8;
  const double ends = 2.0 * 32000 * 4096 * 2;
  EXPECT_NEAR(static_cast<double>(rank.weight_bytes), linear + ends, 0.002 * linear);
  EXPECT_EQ(rank.kv_block_bytes, int64_t{16} * 128 * 1024);
}

TEST(GpuPlan, BlocksFillTheShareOfFreeMemoryThatIsAllowed) {
  const GpuInfo gpu = Gpu(int64_t{16} << 30);
  const auto plan = Plan(
      "mistral-7b", 1,
      {.memory = {.max_slots = 4096, .max_context = 2048}, .gpu = &gpu, .memory_fraction = 0.5});
  const int64_t total = plan.ranks.at(0).total_bytes();
  const int64_t budget = int64_t{8} << 30;
  EXPECT_LE(total, budget + 8 * plan.kv_blocks);
  EXPECT_GT(total + 2 * plan.ranks.at(0).kv_block_bytes, budget);
}

TEST(GpuPlan, NoMoreBlocksThanSequencesCanUse) {
  const GpuInfo gpu = Gpu(int64_t{140} << 30);
  const auto plan =
      Plan("mistral-7b", 1, {.memory = {.max_slots = 2, .max_context = 2048}, .gpu = &gpu});
  EXPECT_EQ(plan.kv_blocks, 2 * 2048 / 16);
}

TEST(GpuPlan, RefusesWithTheNumbersAndTheGpu) {
  const GpuInfo gpu = Gpu(int64_t{4} << 30);
  const auto plan =
      PlanGpuMemory(Shape("mistral-7b"), 1, {.memory = {.max_context = 2048}, .gpu = &gpu});
  EXPECT_TRUE(absl::IsResourceExhausted(plan.status()));
  EXPECT_THAT(std::string(plan.status().message()),
              HasSubstr("90 % of what is free on GPU 3, a GPU"));
}

TEST(GpuPlan, RanksShareLinearLayersHeadAndKvButNotTheEmbedding) {
  const GpuPlanOptions options{.memory = {.max_context = 2048, .kv_blocks = 128}};
  const auto one = Plan("llama-3-70b", 1, options);
  const auto two = Plan("llama-3-70b", 2, options);
  const int64_t embedding = int64_t{128256} * 8192 * 2;
  const int64_t shared = one.ranks.at(0).weight_bytes - embedding;
  EXPECT_NEAR(static_cast<double>(two.ranks.at(0).weight_bytes),
              static_cast<double>(shared) / 2 + static_cast<double>(embedding),
              0.001 * static_cast<double>(shared));
  EXPECT_EQ(two.ranks.at(1).kv_block_bytes * 2, one.ranks.at(0).kv_block_bytes);
}

TEST(GpuPlan, RefusesMoreRanksThanKernelsCount) {
  const auto plan =
      PlanGpuMemory(Shape("llama-3-70b"), 9, {.memory = {.max_context = 2048, .kv_blocks = 128}});
  EXPECT_TRUE(absl::IsInvalidArgument(plan.status())) << plan.status();
  EXPECT_THAT(std::string(plan.status().message()), HasSubstr("at most 8"));
}

// Peers on other machines cannot be written to.
TEST(GpuPlan, NoMemoryOfPeersIsPlannedAcrossMachines) {
  GpuPlanOptions options{.memory = {.max_context = 2048, .kv_blocks = 128}};
  const auto here = Plan("mistral-7b", 2, options);
  options.one_machine = false;
  const auto apart = Plan("mistral-7b", 2, options);
  EXPECT_LT(apart.ranks.at(1).workspace_bytes, here.ranks.at(1).workspace_bytes);
  EXPECT_EQ(apart.ranks.at(1).activation_bytes, here.ranks.at(1).activation_bytes);
}

TEST(GpuPlan, SmolLm2sThreeKvHeadsAreSharedUnevenly) {
  const auto plan = Plan("smollm2", 2, {.memory = {.max_context = 2048, .kv_blocks = 128}});
  EXPECT_EQ(plan.ranks.at(0).kv_block_bytes, 2 * plan.ranks.at(1).kv_block_bytes);
  EXPECT_EQ(plan.kv_blocks, 128);
}

TEST(GpuRank, SaysWhatIsMissingOnAMachineWithoutADriver) {
  const auto gpu = OpenGpu(0);
  if (gpu.ok()) return;  // a machine with a GPU
  EXPECT_TRUE(absl::IsFailedPrecondition(gpu.status())) << gpu.status();
  EXPECT_THAT(std::string(gpu.status().message()), HasSubstr("NVIDIA driver"));
}

}  // namespace
}  // namespace nibble::execution
