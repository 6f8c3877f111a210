// Products of 4-bit weights with AMX int8 tiles, over a type Tiles that stands for the eight tile
// registers: the real ones in amx.cc, an emulation in the tests.
//
// A tile of 16 tokens x 64 columns of x (signed) times a tile of 64 columns x 16 rows of weights
// (unsigned) gives 16 x 16 exact sums. Four such results, 32 tokens x 32 rows, are made for each
// group; AVX-512 then subtracts the zero term, scales and adds, as the other levels do. Weights
// are unpacked to bytes first: 64 bytes hold 4 columns of 16 rows, which is a row of the tile.
#pragma once

#include "kernels/cpu/int8_avx512.h"

namespace nibble::cpu {
namespace {

inline constexpr int32_t kAmxTokens = 16;     // tokens of a tile
inline constexpr int32_t kAmxTileTokens = 2;  // tiles of tokens, side by side
inline constexpr int32_t kAmxTileBlocks = 2;  // row blocks, side by side
inline constexpr int32_t kAmxPanelColumns = 768;
inline constexpr int32_t kAmxPanelGroups = kAmxPanelColumns / 32;

// The operand of LDTILECFG.
struct TileConfig {
  uint8_t palette = 0;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Tiles: results 0 … 3 [token tile][row block], x 4 and 5, weights 6 and 7.
inline constexpr int kResultTile = 0;
inline constexpr int kTokenTile = 4;
inline constexpr int kWeightTile = 6;

// Columns that one tile product covers: a group of 128 takes two.
NIBBLE_INLINE inline int32_t TileColumns(int32_t group) { return group < 64 ? group : 64; }

NIBBLE_INLINE inline TileConfig ConfigFor(int32_t group) {
  TileConfig config;
  config.palette = 1;
  const int32_t columns = TileColumns(group);
  for (int i = 0; i < 4; ++i) {
    config.rows[kResultTile + i] = kAmxTokens;
    config.row_bytes[kResultTile + i] = kBlockRows * sizeof(int32_t);
  }
  for (int i = 0; i < 2; ++i) {
    config.rows[kTokenTile + i] = kAmxTokens;
    config.row_bytes[kTokenTile + i] = static_cast<uint16_t>(columns);
    config.rows[kWeightTile + i] = static_cast<uint8_t>(columns / 4);
    config.row_bytes[kWeightTile + i] = 64;
  }
  return config;
}

struct AmxPanel {
  uint8_t bytes[kAmxTileBlocks][kBlockRows * kAmxPanelColumns] __attribute__((aligned(64)));
  float scales[kAmxTileBlocks][kAmxPanelGroups * kBlockRows] __attribute__((aligned(64)));
  int32_t zeros[kAmxTileBlocks][kAmxPanelGroups * kBlockRows] __attribute__((aligned(64)));
  int32_t first_block = 0;
  int32_t rows = 0;
  int32_t first_column = 0;
  int32_t columns = 0;
  int32_t group = 0;
};

template <int kTokenTiles, int kBlocks>
struct AmxScratch {
  float sums[kTokenTiles * kAmxTokens][kBlocks][kBlockRows] __attribute__((aligned(64)));
  int32_t results[2][kTokenTiles][kBlocks][kAmxTokens][kBlockRows] __attribute__((aligned(64)));
};

// The exact sums of one group and term.
template <class Tiles, int kTokenTiles, int kBlocks>
NIBBLE_INLINE inline void MultiplyGroup(Tiles& tiles, const AmxPanel& panel, int32_t group_index,
                                        const int8_t* x, int64_t x_stride, int32_t term,
                                        AmxScratch<kTokenTiles, kBlocks>& scratch) {
  Unroll<kTokenTiles>([&](auto t) NIBBLE_INLINE {
    Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
      tiles.template Zero<kResultTile + decltype(t)::kConstant * 2 + decltype(r)::kConstant>();
    });
  });
  const int32_t step = TileColumns(panel.group);
  for (int32_t k = 0; k < panel.group; k += step) {
    Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
      const int32_t column = group_index * panel.group + k;
      tiles.template Load<kWeightTile + decltype(r)::kConstant>(
          panel.bytes[r] + column * kBlockRows, 64);
    });
    Unroll<kTokenTiles>([&](auto t) NIBBLE_INLINE {
      constexpr int kTile = decltype(t)::kConstant;
      tiles.template Load<kTokenTile + kTile>(x + kTile * kAmxTokens * x_stride + k, x_stride);
      Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
        constexpr int kBlock = decltype(r)::kConstant;
        tiles.template Dot<kResultTile + kTile * 2 + kBlock, kTokenTile + kTile,
                           kWeightTile + kBlock>();
      });
    });
  }
  Unroll<kTokenTiles>([&](auto t) NIBBLE_INLINE {
    Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
      tiles.template Store<kResultTile + decltype(t)::kConstant * 2 + decltype(r)::kConstant>(
          scratch.results[term][t][r], 64);
    });
  });
}

// sums += scales * (results - zeros * sums of x), for one group.
template <int kTokenTiles, int kBlocks>
NIBBLE_INLINE inline void AddGroup(const AmxPanel& panel, int32_t group_index,
                                   const Int8Activations& x, int64_t at, int64_t groups,
                                   AmxScratch<kTokenTiles, kBlocks>& scratch) {
  const int32_t* x_sums = x.sums + at;
  const float* x_scales = x.scales + at;
  Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
    const __m512i zeros = _mm512_load_si512(panel.zeros[r] + group_index * kBlockRows);
    const __m512 scales = _mm512_load_ps(panel.scales[r] + group_index * kBlockRows);
    for (int t = 0; t < kTokenTiles * kAmxTokens; ++t) {
      __m512i result = _mm512_load_si512(scratch.results[0][t / kAmxTokens][r][t % kAmxTokens]);
      if (x.terms == 2) {
        const auto& lows = scratch.results[1][t / kAmxTokens][r][t % kAmxTokens];
        result = _mm512_add_epi32(_mm512_slli_epi32(result, 8), _mm512_load_si512(lows));
      }
      const __m512i exact = AddZeroTerm(result, zeros, _mm512_set1_epi32(x_sums[t * groups]));
      float* sum = scratch.sums[t][r];
      _mm512_store_ps(sum, Scaled(exact, scales, x_scales[t * groups], _mm512_load_ps(sum)));
    }
  });
}

template <class Tiles, int kTokenTiles, int kBlocks>
void AmxTile(Tiles& tiles, const AmxPanel& panel, const Int8Activations& x, int64_t token,
             const GemmOutput& y) {
  AmxScratch<kTokenTiles, kBlocks> scratch;
  __mmask16 masks[kBlocks];
  for (int r = 0; r < kBlocks; ++r) masks[r] = RowMask(panel.rows, panel.first_block + r);
  for (int t = 0; t < kTokenTiles * kAmxTokens; ++t) {
    for (int r = 0; r < kBlocks; ++r) {
      const float* from = y.values + (token + t) * y.stride + (panel.first_block + r) * kBlockRows;
      _mm512_store_ps(scratch.sums[t][r], panel.first_column == 0
                                              ? _mm512_setzero_ps()
                                              : _mm512_maskz_loadu_ps(masks[r], from));
    }
  }
  const int64_t groups = x.columns / panel.group;
  const int64_t x_stride = static_cast<int64_t>(x.columns) * x.terms;
  for (int32_t g = 0; g < panel.columns / panel.group; ++g) {
    const int64_t column = panel.first_column + static_cast<int64_t>(g) * panel.group;
    for (int32_t term = 0; term < x.terms; ++term) {
      const int8_t* from = x.values + token * x_stride + term * x.columns + column;
      MultiplyGroup<Tiles, kTokenTiles, kBlocks>(tiles, panel, g, from, x_stride, term, scratch);
    }
    AddGroup<kTokenTiles, kBlocks>(panel, g, x, token * groups + column / panel.group, groups,
                                   scratch);
  }
  const bool last = panel.first_column + panel.columns == x.columns;
  const GemmOutput out = {y.values, y.stride, last ? y.bias : nullptr};
  for (int t = 0; t < kTokenTiles * kAmxTokens; ++t) {
    for (int r = 0; r < kBlocks; ++r) {
      StoreRows(out, static_cast<int32_t>(token) + t, panel.first_block + r, masks[r],
                _mm512_load_ps(scratch.sums[t][r]));
    }
  }
}

template <class Tiles, int kBlocks>
void AmxBlocks(Tiles& tiles, const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
               int32_t first_block) {
  AmxPanel panel;
  panel.first_block = first_block;
  panel.rows = w.rows;
  panel.group = w.group;
  for (int32_t column = 0; column < w.columns; column += kAmxPanelColumns) {
    panel.first_column = column;
    panel.columns = Min(kAmxPanelColumns, w.columns - column);
    for (int r = 0; r < kBlocks; ++r) {
      UnpackW4<1>(w, first_block + r, column, panel.columns, x.terms,
                  {panel.bytes[r], panel.scales[r], panel.zeros[r]});
    }
    int64_t token = 0;
    for (; token + kAmxTileTokens * kAmxTokens <= x.tokens; token += kAmxTileTokens * kAmxTokens) {
      AmxTile<Tiles, kAmxTileTokens, kBlocks>(tiles, panel, x, token, y);
    }
    if (token < x.tokens) AmxTile<Tiles, 1, kBlocks>(tiles, panel, x, token, y);
  }
}

// REQUIRES: x.tokens is a multiple of kAmxTokens.
template <class Tiles>
void MultiplyW4Amx(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
                   BlockRange blocks) {
  Tiles tiles;
  tiles.Configure(ConfigFor(w.group));
  int32_t block = blocks.begin;
  for (; block + kAmxTileBlocks <= blocks.end; block += kAmxTileBlocks) {
    AmxBlocks<Tiles, kAmxTileBlocks>(tiles, w, x, y, block);
  }
  if (block < blocks.end) AmxBlocks<Tiles, 1>(tiles, w, x, y, block);
  tiles.Release();
}

// Whole tiles of tokens with AMX, the others (and small batches) with `rest`.
template <class Tiles, class Rest>
void MultiplyW4AmxAndRest(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
                          BlockRange blocks, const Rest& rest) {
  const int32_t whole = x.tokens / kAmxTokens * kAmxTokens;
  Int8Activations part = x;
  if (whole > 0) {
    part.tokens = whole;
    MultiplyW4Amx<Tiles>(w, part, y, blocks);
  }
  if (whole == x.tokens) return;
  const int64_t groups = x.columns / x.group;
  part.tokens = x.tokens - whole;
  part.values = x.values + static_cast<int64_t>(whole) * x.terms * x.columns;
  part.scales = x.scales + whole * groups;
  part.sums = x.sums + whole * groups;
  rest(w, part, {y.values + whole * y.stride, y.stride, y.bias}, blocks);
}

}  // namespace
}  // namespace nibble::cpu
