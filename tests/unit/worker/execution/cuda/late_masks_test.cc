#include "worker/execution/cuda/late_masks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace nibble::execution {
namespace {

using ::testing::ElementsAre;

class LateMasksTest : public ::testing::Test {
 protected:
  LateMasksTest() { masks_.set_memory(memory_); }

  std::vector<uint32_t> memory_ = std::vector<uint32_t>(6);
  LateMasks masks_;
};

TEST_F(LateMasksTest, RowsLieCloseTogetherWhenTheyHaveCome) {
  masks_.Expect(2, 2);
  EXPECT_EQ(masks_.bytes(), 16u);
  EXPECT_TRUE(masks_.waiting());
  EXPECT_TRUE(
      masks_.Provide({.step_id = 9, .mask_words = {1, 2, 77, 3, 4}, .mask_stride = 3}).ok());
  EXPECT_FALSE(masks_.waiting());
  EXPECT_THAT(memory_, ElementsAre(1, 2, 3, 4, 0, 0));
  EXPECT_EQ(masks_.Provide({}).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(LateMasksTest, AStepWithoutThemWaitsForNone) {
  masks_.Expect(0, 2);
  EXPECT_FALSE(masks_.waiting());
  EXPECT_EQ(masks_.bytes(), 0u);
  EXPECT_EQ(masks_.Provide({}).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(LateMasksTest, MasksThatAreTooShortAreRefused) {
  for (const step::MaskBatch& masks :
       {step::MaskBatch{.mask_words = {1, 2, 3}, .mask_stride = 2},
        step::MaskBatch{.mask_words = {1, 2, 3, 4}, .mask_stride = 1},
        step::MaskBatch{.mask_words = {1, 2, 3, 4}, .mask_stride = -2}}) {
    masks_.Expect(2, 2);
    EXPECT_EQ(masks_.Provide(masks).code(), absl::StatusCode::kInvalidArgument);
    EXPECT_TRUE(masks_.waiting());
  }
}

}  // namespace
}  // namespace nibble::execution
