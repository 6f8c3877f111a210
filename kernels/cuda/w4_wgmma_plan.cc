#include "kernels/cuda/w4_wgmma_plan.h"

#include <algorithm>

#include "kernels/cuda/ceil_divide.h"
#include "kernels/cuda/w4_order.h"
#include "kernels/layout/gpu_w4.h"
#include "kernels/layout/gpu_x.h"

namespace nibble::cuda {
namespace {

int32_t RowsOfTile(int32_t group) { return WgmmaRowTiles(group) * layout::kGpuTileRows; }
int32_t Tiles(const W4BatchParams& params) {
  return CeilDivide(params.rows, RowsOfTile(params.group));
}
int32_t Chunks(const W4BatchParams& params) {
  return CeilDivide(layout::GpuSlabs(params.columns), kWgmmaChunkSlabs);
}

}  // namespace

int32_t W4WgmmaParts(const W4BatchParams& params, int32_t multiprocessors) {
  const int32_t chunks = Chunks(params);
  const int32_t parts =
      std::clamp(multiprocessors / Tiles(params), 1, std::min(chunks, kWgmmaPartsMax));
  // No more than the longest needs.
  return CeilDivide(chunks, CeilDivide(chunks, parts));
}

WgmmaHelp W4WgmmaHelp(const W4BatchParams& params, int32_t multiprocessors) {
  if (params.group != 128 || layout::GpuTokenTile(params.tokens) != kWgmmaHelpTokens) return {};
  const int32_t tiles = Tiles(params), chunks = Chunks(params);
  if (2 * tiles <= multiprocessors) return {};  // tiles are cut for all
  const int32_t rounds = CeilDivide(tiles, multiprocessors);
  WgmmaHelp help{.blocks = multiprocessors - CeilDivide(tiles, rounds)};
  if (help.blocks == 0) return {};
  // Helpers are done a chunk before the others, who need not wait then.
  const int32_t tiles_of_helper = CeilDivide(tiles, help.blocks);
  while (help.chunks + 1 < chunks &&
         tiles_of_helper * (help.chunks + 1) + 1 <= rounds * (chunks - help.chunks - 1)) {
    ++help.chunks;
  }
  return help.chunks > 0 ? help : WgmmaHelp{};
}

int64_t WgmmaHelpWords(int32_t rows) {
  constexpr int32_t kGroup = 128;
  return int64_t{CeilDivide(rows, RowsOfTile(kGroup))} * RowsOfTile(kGroup) * kWgmmaHelpTokens;
}

bool W4WgmmaFixedSilu(const W4BatchParams& params, int32_t multiprocessors) {
  return params.output == DecodeOutput::kSiluMul && params.group == 128 &&
         params.rows % RowsOfTile(params.group) == 0 && params.tokens <= kWgmmaFixedTokens &&
         2 * Tiles(params) > multiprocessors;
}

}  // namespace nibble::cuda
