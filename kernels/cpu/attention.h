// Attention over Vec (16 positions, or 16 elements of a head). Included after one of vec_*.h;
// reference.cc defines the order of operations.
//
// A row is one query head of one token. Rows that share a KV head run together, a few at a time in
// registers, tile after tile of 64 positions; `out` holds the running sums. Where many rows share
// a binary16 tile, it is converted once into a panel on the stack.
#pragma once

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/prefetch.h"

namespace nibble::cpu {
namespace {

inline constexpr int32_t kMaxRows = 96;        // rows that share a converted tile
inline constexpr int32_t kPanelRows = 7;       // from here on conversion pays
inline constexpr int32_t kPanelHeadDim = 256;  // larger heads convert in registers
inline constexpr int32_t kTileBlocks = kAttentionTile / kKvBlock;
inline constexpr float kMinusInfinity = -__builtin_inff();

struct AttentionRow {
  const float* q = nullptr;
  float* out = nullptr;
  int32_t begin = 0;  // visible positions [begin, end)
  int32_t end = 0;
  float largest = kMinusInfinity;
  float total = 0;
};

NIBBLE_INLINE inline Vec LoadKv(const float* p) { return Load(p); }
NIBBLE_INLINE inline Vec LoadKv(const uint16_t* p) { return LoadHalf(p); }
NIBBLE_INLINE inline Vec LoadKv8(const float* p) { return LoadFirst(p, 8); }
NIBBLE_INLINE inline Vec LoadKv8(const uint16_t* p) { return LoadHalf8(p); }

// The blocks of one tile where they lie. Blocks that hold no visible position repeat one that
// does: their lanes are computed and thrown away.
template <class T>
struct CacheTile {
  const T* keys[kTileBlocks] = {};    // [head_dim][16]
  const T* values[kTileBlocks] = {};  // [16][head_dim]
  // The same of the tile after it, which is asked for while this one is read: with few rows the
  // cache comes from memory, in pieces too short for the hardware prefetcher.
  const T* next_keys[kTileBlocks] = {};
  const T* next_values[kTileBlocks] = {};
  int64_t head_dim = 0;
  int32_t first = 0;  // position of the tile's first lane

  NIBBLE_INLINE void AskForKey(int block, int64_t d) const {
    Prefetch(next_keys[block] + d * kKvBlock, 0);
  }
  NIBBLE_INLINE void AskForValue(int64_t position, int64_t d) const {
    Prefetch(next_values[position / kKvBlock] + position % kKvBlock * head_dim + d, 0);
  }
  NIBBLE_INLINE const T* Key(int block, int64_t d) const { return keys[block] + d * kKvBlock; }
  NIBBLE_INLINE const T* Value(int position) const {
    return values[position / kKvBlock] + (position % kKvBlock) * head_dim;
  }
  // Values of positions up to here follow each other in memory.
  NIBBLE_INLINE int RunEnd(int position) const { return (position / kKvBlock + 1) * kKvBlock; }
};

// A tile converted to fp32: keys [head_dim][64], values [64][head_dim].
struct PanelTile {
  const float* keys = nullptr;
  const float* values = nullptr;
  int64_t head_dim = 0;
  int32_t first = 0;

  NIBBLE_INLINE void AskForKey(int /*block*/, int64_t /*d*/) const {}
  NIBBLE_INLINE void AskForValue(int64_t /*position*/, int64_t /*d*/) const {}
  NIBBLE_INLINE const float* Key(int block, int64_t d) const {
    return keys + d * kAttentionTile + block * kKvBlock;
  }
  NIBBLE_INLINE const float* Value(int position) const { return values + position * head_dim; }
  NIBBLE_INLINE int RunEnd(int /*position*/) const { return kAttentionTile; }
};

// p[row][position] = scale * dot(q[row], key[position]) for kVecs blocks from `block` on.
template <int kRows, int kVecs, class Tile>
NIBBLE_INLINE inline void ScoresAt(const AttentionRow* rows, const Tile& tile, int block,
                                   float scale, float (*p)[kAttentionTile]) {
  const float* q[kRows];
  Unroll<kRows>([&](auto r) NIBBLE_INLINE { q[r] = rows[r].q; });
  Vec acc[kRows][kVecs];
  Unroll<kRows>([&](auto r) NIBBLE_INLINE {
    Unroll<kVecs>([&](auto b) NIBBLE_INLINE { acc[r][b] = Zero(); });
  });
  for (int64_t d = 0; d < tile.head_dim; ++d) {
    Vec keys[kVecs];
    Unroll<kVecs>([&](auto b) NIBBLE_INLINE {
      keys[b] = LoadKv(tile.Key(block + b, d));
      tile.AskForKey(block + b, d);
    });
    Unroll<kRows>([&](auto r) NIBBLE_INLINE {
      const Vec q_value = Set(q[r][d]);
      Unroll<kVecs>([&](auto b) NIBBLE_INLINE { acc[r][b] = Fma(q_value, keys[b], acc[r][b]); });
    });
  }
  Unroll<kRows>([&](auto r) NIBBLE_INLINE {
    Unroll<kVecs>([&](auto b) NIBBLE_INLINE {
      Store(p[r] + (block + b) * kLanes, Mul(acc[r][b], Set(scale)));
    });
  });
}

// Scores of lanes [0, to); up to the tile's end they are minus infinity or not looked at.
template <int kRows, class Tile>
NIBBLE_INLINE inline void Scores(const AttentionRow* rows, const Tile& tile, int to, float scale,
                                 float (*p)[kAttentionTile]) {
  const int blocks = (to + kKvBlock - 1) / kKvBlock;
  int block = 0;
  for (; block + kAttentionVecs / 2 < blocks; block += kAttentionVecs) {
    ScoresAt<kRows, kAttentionVecs>(rows, tile, block, scale, p);
  }
  for (; block < blocks; ++block) ScoresAt<kRows, 1>(rows, tile, block, scale, p);
  for (; block < kTileBlocks; ++block) {
    for (int r = 0; r < kRows; ++r) Store(p[r] + block * kLanes, Set(kMinusInfinity));
  }
}

// What a row sees of a tile: lanes [from, to).
struct Lanes {
  int from = 0;
  int to = 0;
  [[nodiscard]] NIBBLE_INLINE bool Empty() const { return from >= to; }
};

// Lanes of vector `index` that are seen keep x, the others become y.
template <bool kWhole>
NIBBLE_INLINE inline Vec Seen(const Lanes& lanes, int index, Vec x, Vec y) {
  if constexpr (kWhole) return x;
  const int from = lanes.from - index * kLanes;
  const int to = lanes.to - index * kLanes;
  return Select(from < 0 ? 0 : (from > kLanes ? kLanes : from),
                to < 0 ? 0 : (to > kLanes ? kLanes : to), x, y);
}

// Scores -> weights, row by row; corrections[row] = what earlier sums must be multiplied by.
// kWhole: every row sees the whole tile.
template <int kRows, bool kWhole>
NIBBLE_INLINE inline void SoftmaxStep(float (*p)[kAttentionTile], const Lanes* lanes,
                                      AttentionRow* rows, float* corrections) {
  constexpr int kVecs = kAttentionTile / kLanes;
  static_assert(kRows <= kLanes);
  float changes[kLanes] __attribute__((aligned(64))) = {};
  Unroll<kRows>([&](auto r) NIBBLE_INLINE {
    if (!kWhole && lanes[r].Empty()) return;
    Vec scores[kVecs];
    Unroll<kVecs>([&](auto i) NIBBLE_INLINE {
      scores[i] = Seen<kWhole>(lanes[r], i, Load(p[r] + i * kLanes), Set(kMinusInfinity));
    });
    const float largest = MaxLanes(
        Max(Max(Max(scores[0], scores[1]), Max(scores[2], scores[3])), Set(rows[r].largest)));
    changes[r] = rows[r].largest - largest;
    rows[r].largest = largest;
  });
  Store(corrections, Exp(Load(changes)));
  Unroll<kRows>([&](auto r) NIBBLE_INLINE {
    if (!kWhole && lanes[r].Empty()) return;
    Vec weights[kVecs];
    Unroll<kVecs>([&](auto i) NIBBLE_INLINE {
      const Vec weight = Exp(Sub(Load(p[r] + i * kLanes), Set(rows[r].largest)));
      weights[i] = Seen<kWhole>(lanes[r], i, weight, Zero());
      Store(p[r] + i * kLanes, weights[i]);
    });
    const float sum = SumLanes(Add(Add(weights[0], weights[2]), Add(weights[1], weights[3])));
    rows[r].total = __builtin_fmaf(rows[r].total, corrections[r], sum);
  });
}

// out[row][d …] += p[row][position] * value[position][d …] for positions [from, to) of the tile.
template <int kRows, int kVecs, class Tile>
NIBBLE_INLINE inline void AddValuesAt(const AttentionRow* rows, const Tile& tile, int64_t d,
                                      Lanes lanes, const float (*p)[kAttentionTile]) {
  Vec acc[kRows][kVecs];
  Unroll<kRows>([&](auto r) NIBBLE_INLINE {
    Unroll<kVecs>([&](auto i) NIBBLE_INLINE { acc[r][i] = Load(rows[r].out + d + i * kLanes); });
  });
  for (int64_t position = lanes.from; position < lanes.to;) {
    const auto* value = tile.Value(static_cast<int>(position)) + d;
    const int64_t run_end = tile.RunEnd(static_cast<int>(position));
    const int64_t end = run_end < lanes.to ? run_end : lanes.to;
    for (; position < end; ++position, value += tile.head_dim) {
      Vec values[kVecs];
      Unroll<kVecs>([&](auto i) NIBBLE_INLINE {
        values[i] = LoadKv(value + i * kLanes);
        tile.AskForValue(position, d + i * kLanes);
      });
      Unroll<kRows>([&](auto r) NIBBLE_INLINE {
        const Vec weight = Set(p[r][position]);
        Unroll<kVecs>([&](auto i) NIBBLE_INLINE { acc[r][i] = Fma(weight, values[i], acc[r][i]); });
      });
    }
  }
  Unroll<kRows>([&](auto r) NIBBLE_INLINE {
    Unroll<kVecs>([&](auto i) NIBBLE_INLINE { Store(rows[r].out + d + i * kLanes, acc[r][i]); });
  });
}

// The last 8 elements of a head whose size is an odd multiple of 8.
template <int kRows, class Tile>
NIBBLE_INLINE inline void AddValuesAt8(const AttentionRow* rows, const Tile& tile, int64_t d,
                                       Lanes lanes, const float (*p)[kAttentionTile]) {
  Vec acc[kRows];
  Unroll<kRows>([&](auto r) NIBBLE_INLINE { acc[r] = LoadFirst(rows[r].out + d, 8); });
  for (int position = lanes.from; position < lanes.to; ++position) {
    const Vec value = LoadKv8(tile.Value(position) + d);
    Unroll<kRows>([&](auto r) NIBBLE_INLINE { acc[r] = Fma(Set(p[r][position]), value, acc[r]); });
  }
  Unroll<kRows>([&](auto r) NIBBLE_INLINE { StoreFirst(rows[r].out + d, 8, acc[r]); });
}

template <int kRows, class Tile>
void AddValues(const AttentionRow* rows, const Tile& tile, Lanes lanes,
               const float (*p)[kAttentionTile]) {
  if (lanes.Empty()) return;
  constexpr int kStep = kAttentionVecs * kLanes;
  int64_t d = 0;
  for (; d + kStep <= tile.head_dim; d += kStep) {
    AddValuesAt<kRows, kAttentionVecs>(rows, tile, d, lanes, p);
  }
  for (; d + kLanes <= tile.head_dim; d += kLanes) AddValuesAt<kRows, 1>(rows, tile, d, lanes, p);
  if (d < tile.head_dim) AddValuesAt8<kRows>(rows, tile, d, lanes, p);
}

void ScaleRow(float* out, int64_t head_dim, float factor) {
  int64_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) Store(out + d, Mul(Load(out + d), Set(factor)));
  if (d < head_dim) StoreFirst(out + d, 8, Mul(LoadFirst(out + d, 8), Set(factor)));
}

// A tile for kRows rows. Rows end at different positions: what all see is summed together, what
// lies before and after row by row, so that no row ever meets a value that it must not see.
template <int kRows, class Tile>
__attribute__((noinline)) void AttendTile(const Tile& tile, float scale, AttentionRow* rows) {
  float p[kRows][kAttentionTile] __attribute__((aligned(64)));
  float corrections[kLanes] __attribute__((aligned(64)));
  Lanes lanes[kRows];
  Lanes shared = {0, kAttentionTile};  // what all rows see
  int last = 0;                        // where the last row ends
  for (int r = 0; r < kRows; ++r) {
    const int32_t from = rows[r].begin - tile.first;
    const int32_t to = rows[r].end - tile.first;
    lanes[r] = {from < 0 ? 0 : from, to > kAttentionTile ? kAttentionTile : to};
    shared.from = shared.from < lanes[r].from ? lanes[r].from : shared.from;
    shared.to = shared.to > lanes[r].to ? lanes[r].to : shared.to;
    last = last < lanes[r].to ? lanes[r].to : last;
  }
  Scores<kRows>(rows, tile, last, scale, p);
  if (shared.from == 0 && shared.to == kAttentionTile) {
    SoftmaxStep<kRows, true>(p, lanes, rows, corrections);
  } else {
    SoftmaxStep<kRows, false>(p, lanes, rows, corrections);
  }
  for (int r = 0; r < kRows; ++r) {
    if (corrections[r] != 1.0F) ScaleRow(rows[r].out, tile.head_dim, corrections[r]);
  }
  if (shared.Empty()) {
    for (int r = 0; r < kRows; ++r) AddValues<1>(rows + r, tile, lanes[r], p + r);
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    AddValues<1>(rows + r, tile, {lanes[r].from, shared.from}, p + r);
  }
  AddValues<kRows>(rows, tile, shared, p);
  for (int r = 0; r < kRows; ++r) {
    AddValues<1>(rows + r, tile, {shared.to, lanes[r].to}, p + r);
  }
}

template <class Tile>
void AttendTileRows(const Tile& tile, float scale, AttentionRow* rows, int32_t count) {
  for (; count >= kAttentionRows; count -= kAttentionRows, rows += kAttentionRows) {
    AttendTile<kAttentionRows>(tile, scale, rows);
  }
  Unroll<kAttentionRows - 1>([&](auto c) NIBBLE_INLINE {
    constexpr int kCount = decltype(c)::kConstant + 1;
    if (count == kCount) AttendTile<kCount>(tile, scale, rows);
  });
}

struct KvPanel {
  float keys[kAttentionTile * kPanelHeadDim] __attribute__((aligned(64)));
  float values[kAttentionTile * kPanelHeadDim] __attribute__((aligned(64)));
};

// Converts blocks [first_block, last_block] of a tile for many rows. Keys of the others become
// zero: their lanes are computed and thrown away.
PanelTile ConvertTile(const CacheTile<uint16_t>& tile, int first_block, int last_block,
                      KvPanel* panel) {
  for (int b = 0; b < kTileBlocks; ++b) {
    float* keys = panel->keys + b * kKvBlock;
    if (b < first_block || b > last_block) {
      for (int64_t d = 0; d < tile.head_dim; ++d) Store(keys + d * kAttentionTile, Zero());
      continue;
    }
    for (int64_t d = 0; d < tile.head_dim; ++d) {
      Store(keys + d * kAttentionTile, LoadKv(tile.Key(b, d)));
    }
    float* values = panel->values + b * kKvBlock * tile.head_dim;
    for (int64_t i = 0; i < tile.head_dim * kKvBlock; i += kLanes) {
      Store(values + i, LoadKv(tile.values[b] + i));
    }
  }
  return {panel->keys, panel->values, tile.head_dim, tile.first};
}

// All tiles for rows of one KV head, in rising order of their ends.
template <class T>
void AttendRows(const AttentionArgs& args, int32_t kv_head, AttentionRow* rows, int32_t count,
                KvPanel* panel) {
  const int64_t block_size = static_cast<int64_t>(args.cache.head_dim) * kKvBlock;
  const int32_t begin = rows[0].begin;
  const int32_t end = rows[count - 1].end;
  const T* keys = static_cast<const T*>(args.cache.keys);
  const T* values = static_cast<const T*>(args.cache.values);
  for (int32_t first = begin / kAttentionTile * kAttentionTile; first < end;
       first += kAttentionTile) {
    const int32_t from = begin > first ? begin : first;
    const int32_t to = end < first + kAttentionTile ? end : first + kAttentionTile;
    CacheTile<T> tile;
    tile.head_dim = args.cache.head_dim;
    tile.first = first;
    const auto block_at = [&](int32_t index) NIBBLE_INLINE {
      const int64_t block = args.block_table[index];
      return (block * args.cache.kv_heads + kv_head) * block_size;
    };
    for (int b = 0; b < kTileBlocks; ++b) {
      int32_t index = first / kKvBlock + b;
      if (index < from / kKvBlock) index = from / kKvBlock;
      if (index > (to - 1) / kKvBlock) index = (to - 1) / kKvBlock;
      tile.keys[b] = keys + block_at(index);
      tile.values[b] = values + block_at(index);
      const int32_t next = index + kTileBlocks;
      const int64_t next_at = block_at(next * kKvBlock < end ? next : index);
      tile.next_keys[b] = keys + next_at;
      tile.next_values[b] = values + next_at;
    }
    if constexpr (sizeof(T) == sizeof(uint16_t)) {
      if (count >= kPanelRows && args.cache.head_dim <= kPanelHeadDim) {
        const PanelTile converted =
            ConvertTile(tile, (from - first) / kKvBlock, (to - 1 - first) / kKvBlock, panel);
        AttendTileRows(converted, args.scale, rows, count);
        continue;
      }
    }
    AttendTileRows(tile, args.scale, rows, count);
  }
  for (int32_t r = 0; r < count; ++r) {
    ScaleRow(rows[r].out, args.cache.head_dim, 1.0F / rows[r].total);
  }
}

// Query heads [head_begin, head_end), which all read `kv_head`.
template <class T>
void AttendHeads(const AttentionArgs& args, int32_t token_begin, int32_t token_end,
                 int32_t head_begin, int32_t head_end, int32_t kv_head) {
  KvPanel panel;
  AttentionRow rows[kMaxRows];
  int32_t count = 0;
  for (int64_t t = token_begin; t < token_end; ++t) {
    const int32_t end = args.first_position + static_cast<int32_t>(t) + 1;
    for (int64_t h = head_begin; h < head_end; ++h) {
      AttentionRow& row = rows[count++];
      row = {};
      row.q = args.q + t * args.q_stride + h * args.cache.head_dim;
      row.out = args.out + t * args.out_stride + h * args.cache.head_dim;
      row.begin = args.window > 0 && end > args.window ? end - args.window : 0;
      row.end = end;
      __builtin_memset(row.out, 0, static_cast<size_t>(args.cache.head_dim) * sizeof(float));
      if (count == kMaxRows) {
        AttendRows<T>(args, kv_head, rows, count, &panel);
        count = 0;
      }
    }
  }
  if (count > 0) AttendRows<T>(args, kv_head, rows, count, &panel);
}

void Attention(const AttentionArgs& args, int32_t token_begin, int32_t token_end,
               int32_t head_begin, int32_t head_end) {
  const int32_t kv_heads = args.cache.kv_heads;
  for (int32_t h = head_begin; h < head_end;) {
    const int32_t kv_head = h * kv_heads / args.heads;
    int32_t next = h + 1;
    while (next < head_end && next * kv_heads / args.heads == kv_head) ++next;
    if (args.cache.type == ElementType::kF32) {
      AttendHeads<float>(args, token_begin, token_end, h, next, kv_head);
    } else {
      AttendHeads<uint16_t>(args, token_begin, token_end, h, next, kv_head);
    }
    h = next;
  }
}

}  // namespace
}  // namespace nibble::cpu
