#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "kernels/layout/gpu_x.h"

namespace nibble::layout {
namespace {

TEST(GpuFragments, GivesEveryActivationAPlaceOfItsOwn) {
  for (const int32_t group : {0, 32, 64, 128}) {
    for (const int32_t tokens : {1, 2, 5, 8, 9, 16}) {
      const GpuFragmentOrder order = GpuFragments(tokens, group);
      for (const int32_t columns : {8, 96, 128, 416}) {
        std::vector<bool> taken(static_cast<size_t>(GpuFragmentCount(tokens, columns)));
        for (int32_t token = 0; token < tokens; ++token) {
          for (int32_t k = 0; k < columns; ++k) {
            const auto at = static_cast<size_t>(order.Index(token, k, columns));
            ASSERT_LT(at, taken.size()) << group << " " << tokens << " " << columns;
            ASSERT_FALSE(taken[at]) << group << " " << tokens << " " << columns;
            taken[at] = true;
          }
        }
      }
    }
  }
}

// What lane 4 * (token % 8) + c loads in 16 bytes are its elements of two k-steps.
TEST(GpuFragments, LayALanesElementsOfTwoStepsSideBySide) {
  constexpr int32_t kTokens = 11, kColumns = 384, kTokenTiles = 2;
  for (const int32_t group : {32, 64, 128}) {
    const GpuFragmentOrder order = GpuFragments(kTokens, group);
    for (int32_t token = 0; token < kTokens; ++token) {
      for (int32_t slab = 0; slab < kColumns / kGpuSlabColumns; ++slab) {
        for (int32_t step = 0; step < 8; ++step) {
          for (int32_t c = 0; c < 4; ++c) {
            for (int32_t i = 0; i < 4; ++i) {
              const int32_t k = slab * kGpuSlabColumns + GpuKIndex(step, c, i, group);
              const int32_t load = (slab * kTokenTiles + token / 8) * 4 + step / 2;
              const int32_t lane = token % 8 * 4 + c;
              EXPECT_EQ(order.Index(token, k, kColumns), (load * 32 + lane) * 8 + step % 2 * 4 + i);
            }
          }
        }
      }
    }
  }
}

TEST(GpuFragments, LeaveOneTokensActivationsAsTheyAre) {
  const GpuFragmentOrder order = GpuFragments(1, 128);
  EXPECT_FALSE(order.exists());
  EXPECT_EQ(order.Index(0, 77, 4096), 77);
}

}  // namespace
}  // namespace nibble::layout
