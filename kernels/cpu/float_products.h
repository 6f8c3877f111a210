// Float products over Vec (16 rows). Included after one of vec_*.h; reference.cc defines the
// order of operations.
//
// Few tokens: weights are converted in registers as they stream by, several row blocks at a time
// to have enough independent sums in flight. More tokens: a panel of row blocks x 128 columns is
// converted to fp32 on the stack, and register tiles run over it.
#pragma once

#include "kernels/cpu/kernels.h"

namespace nibble::cpu {
namespace {

inline constexpr int32_t kBlockRows = 16;
inline constexpr int32_t kPanelColumns = 128;

template <ElementType kType>
struct Element;
template <>
struct Element<ElementType::kF16> {
  using Stored = uint16_t;
  NIBBLE_INLINE static Vec Get(const uint16_t* p) { return LoadHalf(p); }
};
template <>
struct Element<ElementType::kBF16> {
  using Stored = uint16_t;
  NIBBLE_INLINE static Vec Get(const uint16_t* p) { return LoadBFloat(p); }
};
template <>
struct Element<ElementType::kF32> {
  using Stored = float;
  NIBBLE_INLINE static Vec Get(const float* p) { return Load(p); }
};

NIBBLE_INLINE inline Vec ScaleVec(const W4Matrix& w, int64_t entry) {
  return w.scale_type == ElementType::kF32
             ? Load(static_cast<const float*>(w.scales) + entry)
             : LoadHalf(static_cast<const uint16_t*>(w.scales) + entry);
}

// sum + s * (acc - z * sum of x)
NIBBLE_INLINE inline Vec AddGroup(Vec acc, Vec zeros, Vec scales, float x_sum, Vec sum) {
  return Fma(scales, Fma(Sub(Set(-0.0F), zeros), Set(x_sum), acc), sum);
}

NIBBLE_INLINE inline void StoreBlock(const GemmOutput& y, int64_t token, int32_t block,
                                     int32_t rows, Vec sum) {
  const int32_t row = block * kBlockRows;
  const int32_t left = rows - row;
  float* to = y.values + token * y.stride + row;
  if (left >= kBlockRows) {
    Store(to, y.bias != nullptr ? Add(sum, Load(y.bias + row)) : sum);
  } else if (left > 0) {
    StoreFirst(to, left, y.bias != nullptr ? Add(sum, LoadFirst(y.bias + row, left)) : sum);
  }
}

// ---- Few tokens ------------------------------------------------------------------------------

template <int kBlocks, int kTokens>
void DirectW4(const W4Matrix& w, const FloatRows& x, const GemmOutput& y, int32_t first_block) {
  const int64_t groups = w.columns / w.group;
  const int64_t block_bytes = static_cast<int64_t>(w.columns) * kBlockRows / 2;
  const int64_t ahead = PrefetchAhead(block_bytes, kBlocks);
  const uint8_t* nibbles = w.nibbles + first_block * block_bytes;
  Vec sum[kBlocks][kTokens];
  Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
    Unroll<kTokens>([&](auto t) NIBBLE_INLINE { sum[r][t] = Zero(); });
  });
  const float* in = x.values;
  for (int64_t g = 0; g < groups; ++g) {
    Vec acc[kBlocks][kTokens];
    Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
      Unroll<kTokens>([&](auto t) NIBBLE_INLINE { acc[r][t] = Zero(); });
    });
    for (int32_t k = 0; k < w.group; k += 8) {
      PackedVec packed[kBlocks];
      Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
        packed[r] = LoadPacked(nibbles + r * block_bytes);
        Prefetch(nibbles + r * block_bytes, ahead);
      });
      Unroll<8>([&](auto j) NIBBLE_INLINE {
        Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
          const Vec weights = Nibbles<decltype(j)::kConstant>(packed[r]);
          Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
            acc[r][t] = Fma(weights, Set(in[t * x.stride + j]), acc[r][t]);
          });
        });
      });
      nibbles += 64;
      in += 8;
    }
    Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
      const int64_t entry = ((first_block + r) * groups + g) * kBlockRows;
      const Vec zeros = LoadBytes(w.zeros + entry);
      const Vec scales = ScaleVec(w, entry);
      Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
        sum[r][t] = AddGroup(acc[r][t], zeros, scales, x.group_sums[t * groups + g], sum[r][t]);
      });
    });
  }
  Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
    Unroll<kTokens>([&](auto t)
                        NIBBLE_INLINE { StoreBlock(y, t, first_block + r, w.rows, sum[r][t]); });
  });
}

template <int kBlocks, int kTokens, ElementType kType>
void DirectDense(const DenseMatrix& w, const FloatRows& x, const GemmOutput& y,
                 int32_t first_block) {
  using Stored = typename Element<kType>::Stored;
  const int64_t block_step = static_cast<int64_t>(w.columns) * kBlockRows;
  const int64_t ahead = PrefetchAhead(block_step * static_cast<int64_t>(sizeof(Stored)), kBlocks);
  const Stored* from = static_cast<const Stored*>(w.values) + first_block * block_step;
  Vec sum[kBlocks][kTokens];
  Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
    Unroll<kTokens>([&](auto t) NIBBLE_INLINE { sum[r][t] = Zero(); });
  });
  for (int32_t k = 0; k < w.columns; ++k) {
    Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
      const Vec weights = Element<kType>::Get(from + r * block_step);
      Prefetch(from + r * block_step, ahead);
      Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
        sum[r][t] = Fma(weights, Set(x.values[t * x.stride + k]), sum[r][t]);
      });
    });
    from += kBlockRows;
  }
  Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
    Unroll<kTokens>([&](auto t)
                        NIBBLE_INLINE { StoreBlock(y, t, first_block + r, w.rows, sum[r][t]); });
  });
}

// ---- Many tokens -----------------------------------------------------------------------------

struct FloatPanel {
  float weights[kPanelColumns * kDenseBlocks * kBlockRows]  // [k][row block][16]
      __attribute__((aligned(64)));
  float scales[kDenseBlocks * kBlockRows] __attribute__((aligned(64)));
  float zeros[kDenseBlocks * kBlockRows] __attribute__((aligned(64)));
};

// What a tile does with its sums over the panel's columns.
enum class PanelKind { kDense, kW4 };

// One panel times kTokens rows of x. Dense: y is the running sum. W4: the panel is one group, whose
// sum is scaled and added to y. y holds whole row blocks here: [token][row block][16].
template <PanelKind kKind, int kBlocks, int kTokens>
__attribute__((noinline)) void MultiplyPanel(const FloatPanel& panel, int32_t columns,
                                             const float* x, int64_t x_stride, const float* x_sums,
                                             int64_t x_sums_stride, float* sums) {
  Vec acc[kTokens][kBlocks];
  Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
    Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
      acc[t][r] = kKind == PanelKind::kDense ? Load(sums + (t * kBlocks + r) * kBlockRows) : Zero();
    });
  });
  const float* weights = panel.weights;
  for (int32_t k = 0; k < columns; ++k) {
    Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
      const Vec w = Load(weights + r * kBlockRows);
      Unroll<kTokens>(
          [&](auto t) NIBBLE_INLINE { acc[t][r] = Fma(w, Set(x[t * x_stride + k]), acc[t][r]); });
    });
    weights += kBlocks * kBlockRows;
  }
  Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
    Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
      float* sum = sums + (t * kBlocks + r) * kBlockRows;
      if constexpr (kKind == PanelKind::kW4) {
        Store(sum,
              AddGroup(acc[t][r], Load(panel.zeros + r * kBlockRows),
                       Load(panel.scales + r * kBlockRows), x_sums[t * x_sums_stride], Load(sum)));
      } else {
        Store(sum, acc[t][r]);
      }
    });
  });
}

// The part of x and y that a panel works on.
struct PanelRange {
  int32_t first_block = 0;
  int32_t rows = 0;
  int32_t first_column = 0;
  int32_t columns = 0;
  int64_t group_index = 0;
  bool first = false;
  bool last = false;
};

template <PanelKind kKind, int kBlocks, int kTokens>
void PanelTile(const FloatPanel& panel, const PanelRange& range, const FloatRows& x, int64_t token,
               const GemmOutput& y) {
  float sums[kTokens * kBlocks * kBlockRows] __attribute__((aligned(64)));
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kBlocks; ++r) {
      const int32_t row = (range.first_block + r) * kBlockRows;
      const int32_t left = range.rows - row;
      const float* from = y.values + (token + t) * y.stride + row;
      Vec sum = Zero();
      if (!range.first) sum = left >= kBlockRows ? Load(from) : LoadFirst(from, left);
      Store(sums + (t * kBlocks + r) * kBlockRows, sum);
    }
  }
  const int64_t groups = kKind == PanelKind::kW4 ? x.columns / range.columns : 0;
  const float* x_sums =
      kKind == PanelKind::kW4 ? x.group_sums + token * groups + range.group_index : nullptr;
  MultiplyPanel<kKind, kBlocks, kTokens>(panel, range.columns,
                                         x.values + token * x.stride + range.first_column, x.stride,
                                         x_sums, groups, sums);
  const GemmOutput out = {y.values, y.stride, range.last ? y.bias : nullptr};
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kBlocks; ++r) {
      StoreBlock(out, token + t, range.first_block + r, range.rows,
                 Load(sums + (t * kBlocks + r) * kBlockRows));
    }
  }
}

template <PanelKind kKind, int kBlocks>
void PanelTokens(const FloatPanel& panel, const PanelRange& range, const FloatRows& x,
                 const GemmOutput& y) {
  const int32_t tiles = (x.tokens + kDenseTokens - 1) / kDenseTokens;
  int32_t token = 0;
  for (int32_t tile = 0; tile < tiles; ++tile) {
    const int32_t count = (x.tokens - token) / (tiles - tile);
    Unroll<kDenseTokens>([&](auto c) NIBBLE_INLINE {
      constexpr int kCount = decltype(c)::kConstant + 1;
      if (count == kCount) PanelTile<kKind, kBlocks, kCount>(panel, range, x, token, y);
    });
    token += count;
  }
}

template <int kBlocks>
void PanelW4(const W4Matrix& w, const FloatRows& x, const GemmOutput& y, int32_t first_block) {
  FloatPanel panel;
  const int64_t groups = w.columns / w.group;
  const int64_t block_bytes = static_cast<int64_t>(w.columns) * kBlockRows / 2;
  const int64_t ahead = PrefetchAhead(block_bytes, kBlocks);
  const uint8_t* nibbles = w.nibbles + first_block * block_bytes;
  for (int64_t g = 0; g < groups; ++g) {
    float* to = panel.weights;
    for (int32_t k = 0; k < w.group; k += 8) {
      Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
        const PackedVec packed = LoadPacked(nibbles + r * block_bytes);
        Prefetch(nibbles + r * block_bytes, ahead);
        Unroll<8>([&](auto j) NIBBLE_INLINE {
          Store(to + (j * kBlocks + r) * kBlockRows, Nibbles<decltype(j)::kConstant>(packed));
        });
      });
      nibbles += 64;
      to += 8 * kBlocks * kBlockRows;
    }
    for (int r = 0; r < kBlocks; ++r) {
      const int64_t entry = ((first_block + r) * groups + g) * kBlockRows;
      Store(panel.zeros + r * kBlockRows, LoadBytes(w.zeros + entry));
      Store(panel.scales + r * kBlockRows, ScaleVec(w, entry));
    }
    const PanelRange range = {.first_block = first_block,
                              .rows = w.rows,
                              .first_column = static_cast<int32_t>(g) * w.group,
                              .columns = w.group,
                              .group_index = g,
                              .first = g == 0,
                              .last = g + 1 == groups};
    PanelTokens<PanelKind::kW4, kBlocks>(panel, range, x, y);
  }
}

template <int kBlocks, ElementType kType>
void PanelDense(const DenseMatrix& w, const FloatRows& x, const GemmOutput& y,
                int32_t first_block) {
  using Stored = typename Element<kType>::Stored;
  FloatPanel panel;
  const int64_t block_step = static_cast<int64_t>(w.columns) * kBlockRows;
  const Stored* from = static_cast<const Stored*>(w.values) + first_block * block_step;
  for (int32_t column = 0; column < w.columns; column += kPanelColumns) {
    const int32_t left = w.columns - column;
    const int32_t columns = left < kPanelColumns ? left : kPanelColumns;
    for (int32_t k = 0; k < columns; ++k) {
      Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
        Store(panel.weights + (k * kBlocks + r) * kBlockRows,
              Element<kType>::Get(from + r * block_step));
      });
      from += kBlockRows;
    }
    const PanelRange range = {.first_block = first_block,
                              .rows = w.rows,
                              .first_column = column,
                              .columns = columns,
                              .group_index = 0,
                              .first = column == 0,
                              .last = column + columns == w.columns};
    PanelTokens<PanelKind::kDense, kBlocks>(panel, range, x, y);
  }
}

// ---- Choice ----------------------------------------------------------------------------------

// body(first block, count as a constant) over the range, in pieces of kDenseBlocks and smaller.
template <class Body>
NIBBLE_INLINE inline void ForBlocks(BlockRange blocks, const Body& body) {
  int32_t block = blocks.begin;
  for (; block + kDenseBlocks <= blocks.end; block += kDenseBlocks) {
    body(block, Index<kDenseBlocks>{});
  }
  Unroll<kDenseBlocks - 1>([&](auto c) NIBBLE_INLINE {
    constexpr int kCount = decltype(c)::kConstant + 1;
    if (blocks.end - block == kCount) body(block, Index<kCount>{});
  });
}

template <int kBlocks>
void W4Blocks(const W4Matrix& w, const FloatRows& x, const GemmOutput& y, int32_t block) {
  if (x.tokens > kDirectTokensMax) return PanelW4<kBlocks>(w, x, y, block);
  Unroll<kDirectTokensMax>([&](auto c) NIBBLE_INLINE {
    constexpr int kCount = decltype(c)::kConstant + 1;
    if (x.tokens == kCount) DirectW4<kBlocks, kCount>(w, x, y, block);
  });
}

template <int kBlocks, ElementType kType>
void DenseBlocks(const DenseMatrix& w, const FloatRows& x, const GemmOutput& y, int32_t block) {
  if (x.tokens > kDirectTokensMax) return PanelDense<kBlocks, kType>(w, x, y, block);
  Unroll<kDirectTokensMax>([&](auto c) NIBBLE_INLINE {
    constexpr int kCount = decltype(c)::kConstant + 1;
    if (x.tokens == kCount) DirectDense<kBlocks, kCount, kType>(w, x, y, block);
  });
}

void MultiplyW4Float(const W4Matrix& w, const FloatRows& x, const GemmOutput& y,
                     BlockRange blocks) {
  ForBlocks(blocks, [&](int32_t block, auto count)
                        NIBBLE_INLINE { W4Blocks<decltype(count)::kConstant>(w, x, y, block); });
}

void MultiplyDense(const DenseMatrix& w, const FloatRows& x, const GemmOutput& y,
                   BlockRange blocks) {
  ForBlocks(blocks, [&](int32_t block, auto count) NIBBLE_INLINE {
    constexpr int kCount = decltype(count)::kConstant;
    switch (w.type) {
      case ElementType::kF16:
        return DenseBlocks<kCount, ElementType::kF16>(w, x, y, block);
      case ElementType::kBF16:
        return DenseBlocks<kCount, ElementType::kBF16>(w, x, y, block);
      case ElementType::kF32:
        return DenseBlocks<kCount, ElementType::kF32>(w, x, y, block);
    }
  });
}

}  // namespace
}  // namespace nibble::cpu
