// How the work of a batch product (w4_wgmma.h) is shared out among blocks, alike for all element
// types. Host code, called when a product is launched and when memory for it is planned.
#pragma once

#include <cstdint>

#include "kernels/cuda/w4_batch.h"

namespace nibble::cuda {

// Of so many tokens, of fp16, blocks may meet and inputs be normed ones.
inline constexpr int32_t kWgmmaMeetingTokens = 32;
// Of so many, of fp16, inputs may be in fixed point.
inline constexpr int32_t kWgmmaFixedTokens = 16;
// In the kernel of so many, blocks without tiles may help those that have some.
inline constexpr int32_t kWgmmaHelpTokens = 32;

// Whatever the tokens: row tiles of a block's tile, and slabs of a chunk along k.
constexpr int32_t WgmmaRowTiles(int32_t group) { return group == 0 ? 8 : 16; }
inline constexpr int32_t kWgmmaChunkSlabs = 2;

// By how many blocks a tile is shared along k where these leave parts or meet.
[[nodiscard]] int32_t W4WgmmaParts(const W4BatchParams& params, int32_t multiprocessors);

// Where whole tiles of more than 16 and up to 32 tokens would leave multiprocessors idle: a block
// for each of these, which take so many chunks of two slabs of every tile. The other
// multiprocessors have a block with tiles each.
struct WgmmaHelp {
  int32_t blocks = 0;  // 0: none
  int32_t chunks = 0;
};
[[nodiscard]] WgmmaHelp W4WgmmaHelp(const W4BatchParams& params, int32_t multiprocessors);
// Of WgmmaInput::help, whatever the device.
[[nodiscard]] int64_t WgmmaHelpWords(int32_t rows);

// Whether whole blocks finish a slab of the next product each.
[[nodiscard]] bool W4WgmmaFixedSilu(const W4BatchParams& params, int32_t multiprocessors);

}  // namespace nibble::cuda
