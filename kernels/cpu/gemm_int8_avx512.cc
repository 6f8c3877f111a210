// Integer products with AVX-512 VNNI.
//
// Few tokens: weights are unpacked in registers as they stream by.
// More tokens: a few row blocks are unpacked to bytes in a panel on the stack (L1), and tiles of
// 24 accumulators run over it.
// Activations of two terms: a group is multiplied by the highs, shifted by 8 bits in the
// accumulators, and multiplied by the lows.
#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/avx512.h"
#include "kernels/cpu/int8_avx512.h"

namespace nibble::cpu {
namespace {

constexpr int32_t kHeadGroup = 32;
constexpr int32_t kDirectTokens = 16;  // up to here weights are unpacked in registers
constexpr int32_t kTileTokens = 8;     // tokens of a register tile
constexpr int32_t kTileBlocks = 3;     // row blocks of a register tile
constexpr int32_t kPanelColumns = 768;
constexpr int32_t kPanelGroups = kPanelColumns / 32;
constexpr int32_t kMinus128 = 0xff80;  // in the low 16 bits of a lane, 0 above

NIBBLE_INLINE inline __m512i Broadcast4(const int8_t* x) {
  int32_t four = 0;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm512_set1_epi32(four);
}

// acc + four products w (unsigned) * x (signed) per lane. As assembler, since GCC 12 copies the
// accumulator around its intrinsic.
NIBBLE_INLINE inline __m512i Dot4(__m512i acc, __m512i w, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}

// ---- Few tokens ------------------------------------------------------------------------------

// One or two tokens, whose terms are multiplied side by side. High nibbles stay in place (16 q)
// with accumulators of their own: one shift per group instead of one per vector. Two pairs of
// accumulators hide the latency of dpbusd.
template <int kTokens, int kTerms>
void DirectBlockW4(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
                   int32_t block) {
  constexpr int kRows = kTokens * kTerms;
  const int32_t groups = w.columns / w.group;
  const int64_t columns = w.columns;
  const __m512i low_mask = _mm512_set1_epi8(0x0f);
  const uint8_t* nibbles = w.nibbles + static_cast<int64_t>(block) * kBlockRows * columns / 2;
  const int8_t* xq = x.values;
  const int8_t* group_end = xq;
  __m512 sum[kTokens];
  Unroll<kTokens>([&](auto t) NIBBLE_INLINE { sum[t] = _mm512_setzero_ps(); });
  for (int32_t g = 0; g < groups; ++g) {
    const int64_t entry = (static_cast<int64_t>(block) * groups + g) * kBlockRows;
    __m512i low[2][kRows];
    __m512i high[2][kRows];
    Unroll<2>([&](auto u) NIBBLE_INLINE {
      Unroll<kRows>([&](auto t) NIBBLE_INLINE { low[u][t] = high[u][t] = _mm512_setzero_si512(); });
    });
    group_end += w.group;
    do {
      Unroll<2>([&](auto u) NIBBLE_INLINE {
        const __m512i packed = _mm512_loadu_si512(nibbles + u * 64);
        Prefetch(nibbles + u * 64);
        const __m512i lows = _mm512_and_si512(packed, low_mask);
        const __m512i highs = _mm512_andnot_si512(low_mask, packed);
        Unroll<kRows>([&](auto t) NIBBLE_INLINE {
          low[u][t] = Dot4(low[u][t], lows, Broadcast4(xq + t * columns + u * 8));
          high[u][t] = Dot4(high[u][t], highs, Broadcast4(xq + t * columns + u * 8 + 4));
        });
      });
      nibbles += 128;
      xq += 16;
    } while (xq != group_end);
    const __m512i zeros = NegatedZeros(w.zeros + entry, kTerms);
    const __m512 scales = LoadScales(w.scales, entry, w.scale_type);
    const auto term_sum = [&](auto row) NIBBLE_INLINE {
      const __m512i sixteenfold = _mm512_add_epi32(high[0][row], high[1][row]);
      return _mm512_add_epi32(_mm512_add_epi32(low[0][row], low[1][row]),
                              _mm512_srai_epi32(sixteenfold, 4));
    };
    Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
      constexpr int kRow = decltype(t)::kConstant * kTerms;
      __m512i acc = term_sum(Index<kRow>{});
      if constexpr (kTerms == 2) {
        acc = _mm512_add_epi32(_mm512_slli_epi32(acc, 8), term_sum(Index<kRow + 1>{}));
      }
      acc = AddZeroTerm(acc, zeros, _mm512_set1_epi32(x.sums[t * groups + g]));
      sum[t] = Scaled(acc, scales, x.scales[t * groups + g], sum[t]);
    });
  }
  const __mmask16 mask = RowMask(w.rows, block);
  Unroll<kTokens>([&](auto t) NIBBLE_INLINE { StoreRows(y, t, block, mask, sum[t]); });
}

// Sums live in memory between groups: they and the accumulators would not fit the registers.
template <int kBlocks, int kTokens>
using DirectSums = float[kTokens][kBlocks][kBlockRows];

template <int kBlocks, int kTokens, int kTerms>
__attribute__((noinline)) void MultiplyPacked(const W4Matrix& w, const Int8Activations& x,
                                              int64_t first_token, int64_t first_block,
                                              DirectSums<kBlocks, kTokens>& sums) {
  const int64_t columns = w.columns;
  const int64_t x_stride = columns * kTerms;
  const int64_t groups = columns / w.group;
  const int64_t block_bytes = columns * kBlockRows / 2;
  const int64_t ahead = PrefetchAhead(block_bytes, kBlocks);
  const __m512i low_mask = _mm512_set1_epi8(0x0f);
  const uint8_t* nibbles = w.nibbles + first_block * block_bytes;
  const int8_t* xq = x.values + first_token * x_stride;
  for (int64_t g = 0; g < groups; ++g) {
    __m512i acc[kTokens][kBlocks];
    Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
      Unroll<kBlocks>([&](auto r) NIBBLE_INLINE { acc[t][r] = _mm512_setzero_si512(); });
    });
    for (int32_t term = 0;; ++term) {
      const int8_t* term_end = xq + w.group;
      do {
        __m512i lows[kBlocks];
        __m512i highs[kBlocks];
        Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
          const __m512i packed = _mm512_loadu_si512(nibbles + r * block_bytes);
          Prefetch(nibbles + r * block_bytes, ahead);
          lows[r] = _mm512_and_si512(packed, low_mask);
          highs[r] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_mask);
        });
        Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
          const __m512i four = Broadcast4(xq + t * x_stride);
          Unroll<kBlocks>([&](auto r)
                              NIBBLE_INLINE { acc[t][r] = Dot4(acc[t][r], lows[r], four); });
        });
        Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
          const __m512i four = Broadcast4(xq + t * x_stride + 4);
          Unroll<kBlocks>([&](auto r)
                              NIBBLE_INLINE { acc[t][r] = Dot4(acc[t][r], highs[r], four); });
        });
        nibbles += 64;
        xq += 8;
      } while (xq != term_end);
      if (term + 1 == kTerms) break;
      Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
        Unroll<kBlocks>([&](auto r) NIBBLE_INLINE { acc[t][r] = _mm512_slli_epi32(acc[t][r], 8); });
      });
      nibbles -= w.group * 8;
      xq += columns - w.group;
    }
    xq -= (kTerms - 1) * columns;
    Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
      const int64_t entry = ((first_block + r) * groups + g) * kBlockRows;
      const __m512i zeros = NegatedZeros(w.zeros + entry, kTerms);
      const __m512 scales = LoadScales(w.scales, entry, w.scale_type);
      Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
        const int64_t at = (first_token + t) * groups + g;
        const __m512i exact = AddZeroTerm(acc[t][r], zeros, _mm512_set1_epi32(x.sums[at]));
        _mm512_store_ps(sums[t][r],
                        Scaled(exact, scales, x.scales[at], _mm512_load_ps(sums[t][r])));
      });
    });
  }
}

template <int kBlocks, int kTokens>
void DirectTileW4(const W4Matrix& w, const Int8Activations& x, int32_t first_token,
                  const GemmOutput& y, int32_t first_block) {
  DirectSums<kBlocks, kTokens> sums __attribute__((aligned(64))) = {};
  x.terms == 1 ? MultiplyPacked<kBlocks, kTokens, 1>(w, x, first_token, first_block, sums)
               : MultiplyPacked<kBlocks, kTokens, 2>(w, x, first_token, first_block, sums);
  for (int r = 0; r < kBlocks; ++r) {
    const __mmask16 mask = RowMask(w.rows, first_block + r);
    for (int t = 0; t < kTokens; ++t) {
      StoreRows(y, first_token + t, first_block + r, mask, _mm512_load_ps(sums[t][r]));
    }
  }
}

// Token tiles of equal size, so far as possible: 9 tokens are 4 + 5, not 8 + 1.
template <int kBlocks>
void DirectBlocksW4(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
                    int32_t first_block) {
  const int32_t tiles = (x.tokens + kTileTokens - 1) / kTileTokens;
  int32_t token = 0;
  for (int32_t tile = 0; tile < tiles; ++tile) {
    const int32_t count = (x.tokens - token) / (tiles - tile);
    Unroll<kTileTokens>([&](auto c) NIBBLE_INLINE {
      constexpr int kCount = decltype(c)::kConstant + 1;
      if (count == kCount) DirectTileW4<kBlocks, kCount>(w, x, token, y, first_block);
    });
    token += count;
  }
}

void DirectW4(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y, BlockRange blocks) {
  int32_t block = blocks.begin;
  if (x.tokens <= 2) {
    const auto multiply = x.tokens == 1
                              ? (x.terms == 1 ? DirectBlockW4<1, 1> : DirectBlockW4<1, 2>)
                              : (x.terms == 1 ? DirectBlockW4<2, 1> : DirectBlockW4<2, 2>);
    for (; block < blocks.end && x.tokens > 0; ++block) multiply(w, x, y, block);
    return;
  }
  for (; block + 2 <= blocks.end; block += 2) DirectBlocksW4<2>(w, x, y, block);
  if (block < blocks.end) DirectBlocksW4<1>(w, x, y, block);
}

template <int kTokens>
void TileInt8(const Int8Matrix& w, const Int8Activations& x, int64_t first_token,
              const GemmOutput& y, int32_t block) {
  const int64_t groups = w.columns / kHeadGroup;
  const int64_t columns = w.columns;
  const __m512i zeros = _mm512_set1_epi32(kMinus128);
  const uint8_t* values = w.values + block * kBlockRows * columns;
  const float* scales = w.scales + block * groups * kBlockRows;
  const int8_t* xq = x.values + first_token * columns;
  const int32_t* x_sums = x.sums + first_token * groups;
  const float* x_scales = x.scales + first_token * groups;
  __m512 sum[kTokens];
  Unroll<kTokens>([&](auto t) NIBBLE_INLINE { sum[t] = _mm512_setzero_ps(); });
  for (int64_t g = 0; g < groups; ++g) {
    __m512i acc[2][kTokens];
    Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
      acc[0][t] =
          AddZeroTerm(_mm512_setzero_si512(), zeros, _mm512_set1_epi32(x_sums[t * groups + g]));
      acc[1][t] = _mm512_setzero_si512();
    });
    Unroll<kHeadGroup / 4>([&](auto v) NIBBLE_INLINE {
      const __m512i weights = _mm512_loadu_si512(values + v * 64);
      Prefetch(values + v * 64);
      Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
        acc[v % 2][t] = Dot4(acc[v % 2][t], weights, Broadcast4(xq + t * columns + v * 4));
      });
    });
    values += kHeadGroup * kBlockRows;
    xq += kHeadGroup;
    const __m512 group_scales = _mm512_loadu_ps(scales + g * kBlockRows);
    Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
      sum[t] = Scaled(_mm512_add_epi32(acc[0][t], acc[1][t]), group_scales,
                      x_scales[t * groups + g], sum[t]);
    });
  }
  const __mmask16 mask = RowMask(w.rows, block);
  Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
    StoreRows(y, static_cast<int32_t>(first_token) + t, block, mask, sum[t]);
  });
}

// ---- Many tokens -----------------------------------------------------------------------------

// Bytes, scales and negated zeros of some row blocks and columns.
struct Panel {
  const uint8_t* bytes = nullptr;  // [vector of 4 columns][row block][64]
  const float* scales = nullptr;   // [group][row block][16]
  const int32_t* zeros = nullptr;  // [group][row block][16]
  int32_t first_column = 0;
  int32_t groups = 0;
  int32_t group = 0;
  int32_t first_block = 0;
  const __mmask16* masks = nullptr;  // rows that exist, per row block
  bool first = false;                // sums start at zero; else they go on from y
  bool last = false;                 // the bias is due
};

// Sums live in memory between groups: 24 accumulators and they would not fit the registers.
template <int kBlocks>
using TileSums = float[kTileTokens][kBlocks][kBlockRows];

template <int kBlocks, int kTokens, int kTerms>
__attribute__((noinline)) void MultiplyTile(const Panel& panel, const Int8Activations& x,
                                            int32_t first_token, TileSums<kBlocks>& sums) {
  const int64_t x_stride = static_cast<int64_t>(x.columns) * kTerms;
  const int64_t groups = x.columns / panel.group;
  const int64_t first_group = first_token * groups + panel.first_column / panel.group;
  const int8_t* xq = x.values + first_token * x_stride + panel.first_column;
  const uint8_t* bytes = panel.bytes;
  const float* scales = panel.scales;
  const int32_t* zeros = panel.zeros;
  for (int64_t g = first_group; g < first_group + panel.groups; ++g) {
    __m512i acc[kTokens][kBlocks];
    Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
      Unroll<kBlocks>([&](auto r) NIBBLE_INLINE { acc[t][r] = _mm512_setzero_si512(); });
    });
    for (int32_t term = 0;; ++term) {
      const int8_t* term_end = xq + panel.group;
      do {
        __m512i weights[kBlocks];
        Unroll<kBlocks>([&](auto r)
                            NIBBLE_INLINE { weights[r] = _mm512_load_si512(bytes + r * 64); });
        Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
          const __m512i four = Broadcast4(xq + t * x_stride);
          Unroll<kBlocks>([&](auto r)
                              NIBBLE_INLINE { acc[t][r] = Dot4(acc[t][r], weights[r], four); });
        });
        bytes += kBlocks * 64;
        xq += 4;
      } while (xq != term_end);
      if (term + 1 == kTerms) break;
      Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
        Unroll<kBlocks>([&](auto r) NIBBLE_INLINE { acc[t][r] = _mm512_slli_epi32(acc[t][r], 8); });
      });
      bytes -= panel.group * kBlocks * kBlockRows;
      xq += x.columns - panel.group;
    }
    xq -= (kTerms - 1) * static_cast<int64_t>(x.columns);
    const int32_t* x_sums = x.sums + g;
    const float* x_scales = x.scales + g;
    Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
      const __m512i x_sum = _mm512_set1_epi32(*x_sums);
      Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
        const __m512i exact =
            AddZeroTerm(acc[t][r], _mm512_load_si512(zeros + r * kBlockRows), x_sum);
        _mm512_store_ps(sums[t][r], Scaled(exact, _mm512_load_ps(scales + r * kBlockRows),
                                           *x_scales, _mm512_load_ps(sums[t][r])));
      });
      x_sums += groups;
      x_scales += groups;
    });
    scales += kBlocks * kBlockRows;
    zeros += kBlocks * kBlockRows;
  }
}

template <int kBlocks, int kTokens>
void PanelTile(const Panel& panel, const Int8Activations& x, int32_t first_token,
               const GemmOutput& y) {
  TileSums<kBlocks> sums __attribute__((aligned(64)));
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kBlocks; ++r) {
      const float* from =
          y.values + (first_token + t) * y.stride + (panel.first_block + r) * kBlockRows;
      _mm512_store_ps(sums[t][r], panel.first ? _mm512_setzero_ps()
                                              : _mm512_maskz_loadu_ps(panel.masks[r], from));
    }
  }
  x.terms == 1 ? MultiplyTile<kBlocks, kTokens, 1>(panel, x, first_token, sums)
               : MultiplyTile<kBlocks, kTokens, 2>(panel, x, first_token, sums);
  const GemmOutput out = {y.values, y.stride, panel.last ? y.bias : nullptr};
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kBlocks; ++r) {
      StoreRows(out, first_token + t, panel.first_block + r, panel.masks[r],
                _mm512_load_ps(sums[t][r]));
    }
  }
}

template <int kBlocks>
void PanelTokens(const Panel& panel, const Int8Activations& x, const GemmOutput& y) {
  const int32_t tiles = (x.tokens + kTileTokens - 1) / kTileTokens;
  int32_t token = 0;
  for (int32_t tile = 0; tile < tiles; ++tile) {
    const int32_t count = (x.tokens - token) / (tiles - tile);
    Unroll<kTileTokens>([&](auto c) NIBBLE_INLINE {
      constexpr int kCount = decltype(c)::kConstant + 1;
      if (count == kCount) PanelTile<kBlocks, kCount>(panel, x, token, y);
    });
    token += count;
  }
}

struct PanelMemory {
  uint8_t bytes[kTileBlocks * kBlockRows * kPanelColumns] __attribute__((aligned(64)));
  float scales[kPanelGroups * kTileBlocks * kBlockRows] __attribute__((aligned(64)));
  int32_t zeros[kPanelGroups * kTileBlocks * kBlockRows] __attribute__((aligned(64)));
};

template <int kBlocks>
void PanelW4(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
             int32_t first_block) {
  PanelMemory memory;
  __mmask16 masks[kBlocks];
  for (int r = 0; r < kBlocks; ++r) masks[r] = RowMask(w.rows, first_block + r);
  const int32_t step = kPanelColumns / w.group * w.group;
  for (int32_t column = 0; column < w.columns; column += step) {
    const int32_t columns = Min(step, w.columns - column);
    UnpackW4<kBlocks>(w, first_block, column, columns, x.terms,
                      {memory.bytes, memory.scales, memory.zeros});
    const Panel panel = {.bytes = memory.bytes,
                         .scales = memory.scales,
                         .zeros = memory.zeros,
                         .first_column = column,
                         .groups = columns / w.group,
                         .group = w.group,
                         .first_block = first_block,
                         .masks = masks,
                         .first = column == 0,
                         .last = column + columns == w.columns};
    PanelTokens<kBlocks>(panel, x, y);
  }
}

}  // namespace

void GemmW4Int8Avx512(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
                      BlockRange blocks) {
  if (x.tokens <= kDirectTokens) return DirectW4(w, x, y, blocks);
  int32_t block = blocks.begin;
  for (; block + kTileBlocks <= blocks.end; block += kTileBlocks) {
    PanelW4<kTileBlocks>(w, x, y, block);
  }
  switch (blocks.end - block) {
    case 1:
      return PanelW4<1>(w, x, y, block);
    case 2:
      return PanelW4<2>(w, x, y, block);
    default:
      return;
  }
}

// A row block stays in L1 for all its tiles of tokens: a panel of several blocks gains nothing.
void GemmInt8Avx512(const Int8Matrix& w, const Int8Activations& x, const GemmOutput& y,
                    BlockRange blocks) {
  const int32_t tiles = (x.tokens + kTileTokens - 1) / kTileTokens;
  for (int32_t block = blocks.begin; block < blocks.end; ++block) {
    int32_t token = 0;
    for (int32_t tile = 0; tile < tiles; ++tile) {
      const int32_t count = (x.tokens - token) / (tiles - tile);
      Unroll<kTileTokens>([&](auto c) NIBBLE_INLINE {
        constexpr int kCount = decltype(c)::kConstant + 1;
        if (count == kCount) TileInt8<kCount>(w, x, token, y, block);
      });
      token += count;
    }
  }
}

}  // namespace nibble::cpu
