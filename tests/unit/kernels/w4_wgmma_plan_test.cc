#include "kernels/cuda/w4_wgmma_plan.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace nibble::cuda {
namespace {

constexpr int32_t kMultiprocessors = 132;

W4BatchParams Of(int32_t rows, int32_t columns, int32_t tokens, int32_t group = 128) {
  return {.rows = rows, .columns = columns, .group = group, .tokens = tokens};
}

TEST(WgmmaPlanTest, PartsFillTheDeviceAndNoneIsEmpty) {
  for (int32_t rows = 8; rows <= 16384; rows += 1016) {
    for (int32_t columns = 128; columns <= 16384; columns += 896) {
      const int32_t parts = W4WgmmaParts(Of(rows, columns, 32), kMultiprocessors);
      const int32_t tiles = (rows + 255) / 256, chunks = (columns + 255) / 256;
      ASSERT_GE(parts, 1);
      ASSERT_LE(parts, std::min(chunks, 8));
      ASSERT_TRUE(parts == 1 || parts * tiles <= kMultiprocessors) << rows << " x " << columns;
      const int32_t longest = (chunks + parts - 1) / parts;
      ASSERT_GT(chunks, longest * (parts - 1)) << rows << " x " << columns;
    }
  }
}

TEST(WgmmaPlanTest, BlocksWithoutTilesTakeTwoOfSixteenChunksOfGateAndUp) {
  for (const int32_t tokens : {17, 32}) {
    const WgmmaHelp help = W4WgmmaHelp(Of(28672, 4096, tokens), kMultiprocessors);
    EXPECT_EQ(help.blocks, 20);
    EXPECT_EQ(help.chunks, 2);
  }
}

TEST(WgmmaPlanTest, NobodyHelpsOutsideItsKernelOrWhereTilesAreCutOrFillTheDevice) {
  for (const W4BatchParams& params :
       {Of(28672, 4096, 16), Of(28672, 4096, 33), Of(28672, 4096, 32, 64), Of(28672, 4096, 32, 0),
        Of(66 * 256, 4096, 32), Of(132 * 256, 4096, 32), Of(28672, 128, 32)}) {
    EXPECT_EQ(W4WgmmaHelp(params, kMultiprocessors).blocks, 0)
        << params.rows << " x " << params.columns << " x " << params.tokens;
  }
}

// Helpers first bring what others wait for, so they must be done before these.
TEST(WgmmaPlanTest, HelpersHaveLessToDoThanThoseWhomTheyHelp) {
  for (int32_t rows = 256; rows <= 600 * 256; rows += 256) {
    const WgmmaHelp help = W4WgmmaHelp(Of(rows, 8192, 32), kMultiprocessors);
    if (help.blocks == 0) continue;
    const int32_t tiles = rows / 256, chunks = 32;
    const int32_t others = kMultiprocessors - help.blocks;
    const int32_t of_helper = (tiles + help.blocks - 1) / help.blocks * help.chunks;
    ASSERT_LT(of_helper, (tiles + others - 1) / others * (chunks - help.chunks)) << rows;
  }
}

TEST(WgmmaPlanTest, SiluLeavesFixedPointFromWholeTilesAlone) {
  W4BatchParams params = Of(28672, 4096, 16);
  params.output = DecodeOutput::kSiluMul;
  EXPECT_TRUE(W4WgmmaFixedSilu(params, kMultiprocessors));
  params.tokens = 17;
  EXPECT_FALSE(W4WgmmaFixedSilu(params, kMultiprocessors));
  params.tokens = 16;
  params.rows = 28672 + 128;
  EXPECT_FALSE(W4WgmmaFixedSilu(params, kMultiprocessors));
}

}  // namespace
}  // namespace nibble::cuda
