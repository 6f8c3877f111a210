#include "worker/execution/cuda/host_matrix.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/test_data.h"
#include "worker/weights/float_types.h"
#include "worker/weights/rank_weights.h"

namespace nibble::execution {
namespace {

TEST(HostMatrix, ValuesBeyondFp16AreRefusedByName) {
  const std::vector<float> values = {1.5f, -65504.0f, 70000.0f};
  const auto narrowed = NarrowToHalf(values, "model.layers.3.mlp.down_proj");
  EXPECT_TRUE(absl::IsInvalidArgument(narrowed.status()));
  EXPECT_THAT(std::string(narrowed.status().message()),
              ::testing::HasSubstr("model.layers.3.mlp.down_proj holds 70000"));
  const auto fits = NarrowToHalf(std::span(values).first(2), "w");
  ASSERT_TRUE(fits.ok());
  EXPECT_EQ(weights::HalfToFloat((*fits)[1]), -65504.0f);
}

// Threads read ahead; what comes out is in order and complete.
TEST(MatrixQueue, GivesEveryMatrixOfARankInOrder) {
  const auto folder = testing::TestData("models/smollm2-135m-awq-gemm-g64", "MatrixQueue");
  if (!folder.has_value()) return;
  const auto checkpoint = weights::Checkpoint::Open(*folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto shares = weights::PlanShares(**checkpoint, 2);
  ASSERT_TRUE(shares.ok());
  const weights::RankShare& share = (*shares)[1];
  MatrixQueue queue(**checkpoint, share);
  const int32_t layers = (*checkpoint)->spec().layer_count;
  for (int32_t layer = 0; layer < layers; ++layer) {
    const auto qkv = queue.Next();
    const auto o = queue.Next();
    const auto gate_up = queue.Next();
    const auto down = queue.Next();
    ASSERT_TRUE(qkv.ok() && o.ok() && gate_up.ok() && down.ok());
    EXPECT_EQ(gate_up->rows, 2 * share.ffn.count());
    EXPECT_EQ(down->columns, share.ffn.count());
    if (layer != layers / 2) continue;
    const auto want = weights::LoadDown(**checkpoint, share, layer);
    ASSERT_TRUE(want.ok());
    EXPECT_EQ(down->q, want->q);
    EXPECT_EQ(down->zeros, want->zeros);
    EXPECT_EQ(down->group, want->group_size);
  }
  const auto head = queue.Next();
  ASSERT_TRUE(head.ok());
  EXPECT_EQ(head->rows, share.vocab.count());
  const auto embedding = queue.Next();
  ASSERT_TRUE(embedding.ok());
  EXPECT_EQ(embedding->rows, (*checkpoint)->spec().vocab_size);
}

}  // namespace
}  // namespace nibble::execution
