// Attention over Vec (16 positions, or 16 elements of a head). Included after one of vec_*.h;
// reference.cc defines the order of operations.
//
// A row is one query head of one token. Rows that share a KV head run together, a few at a time in
// registers, tile after tile of 64 positions; `out` holds the running sums. Where many rows share
// a binary16 tile, it is converted once into a panel on the stack.
#pragma once

#include "kernels/cpu/elementwise.h"

namespace nibble::cpu {
namespace {

inline constexpr int32_t kMaxRows = 48;           // rows that share a converted tile
inline constexpr int32_t kPanelRows = 7;          // from here on conversion pays
inline constexpr int32_t kPanelHeadDim = 256;     // larger heads convert in registers
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

// The blocks of one tile. Blocks that hold no visible position repeat one that does: their lanes
// are computed and thrown away.
template <class T>
struct Tile {
  const T* keys[kTileBlocks] = {};    // [head_dim][16]
  const T* values[kTileBlocks] = {};  // [16][head_dim]
  int32_t first = 0;                  // position of the tile's first lane
};

// p[row][position] = scale * dot(q[row], key[position])
template <int kRows, class T>
NIBBLE_INLINE inline void Scores(const AttentionRow* rows, const Tile<T>& tile, int32_t head_dim,
                                 float scale, float (*p)[kAttentionTile]) {
  for (int block = 0; block < kTileBlocks; block += kAttentionVecs) {
    Vec acc[kRows][kAttentionVecs];
    Unroll<kRows>([&](auto r) NIBBLE_INLINE {
      Unroll<kAttentionVecs>([&](auto b) NIBBLE_INLINE { acc[r][b] = Zero(); });
    });
    for (int64_t d = 0; d < head_dim; ++d) {
      Unroll<kAttentionVecs>([&](auto b) NIBBLE_INLINE {
        const Vec key = LoadKv(tile.keys[block + b] + d * kKvBlock);
        Unroll<kRows>([&](auto r) NIBBLE_INLINE {
          acc[r][b] = Fma(Set(rows[r].q[d]), key, acc[r][b]);
        });
      });
    }
    Unroll<kRows>([&](auto r) NIBBLE_INLINE {
      Unroll<kAttentionVecs>([&](auto b) NIBBLE_INLINE {
        Store(p[r] + (block + b) * kLanes, Mul(acc[r][b], Set(scale)));
      });
    });
  }
}

// Scores of positions [from, to) of the tile -> weights; returns the correction of earlier sums.
NIBBLE_INLINE inline float SoftmaxStep(float* p, int from, int to, AttentionRow* row) {
  constexpr int kVecs = kAttentionTile / kLanes;
  Vec score[kVecs];
  Vec largest_lanes = Set(row->largest);
  Unroll<kVecs>([&](auto i) NIBBLE_INLINE {
    const int low = from - i * kLanes;
    const int high = to - i * kLanes;
    score[i] = Select(low < 0 ? 0 : (low > kLanes ? kLanes : low),
                      high < 0 ? 0 : (high > kLanes ? kLanes : high), Load(p + i * kLanes),
                      Set(kMinusInfinity));
    largest_lanes = Max(largest_lanes, score[i]);
  });
  const float largest = MaxLanes(largest_lanes);
  Unroll<kVecs>([&](auto i) NIBBLE_INLINE {
    const int low = from - i * kLanes;
    const int high = to - i * kLanes;
    score[i] = Select(low < 0 ? 0 : (low > kLanes ? kLanes : low),
                      high < 0 ? 0 : (high > kLanes ? kLanes : high),
                      Exp(Sub(score[i], Set(largest))), Zero());
    Store(p + i * kLanes, score[i]);
  });
  const float sum = SumLanes(Add(Add(score[0], score[2]), Add(score[1], score[3])));
  float lanes[kLanes];
  Store(lanes, Exp(Set(row->largest - largest)));
  const float correction = lanes[0];
  row->total = __builtin_fmaf(row->total, correction, sum);
  row->largest = largest;
  return correction;
}

// out[row][d …] += p[row][position] * value[position][d …] for positions [from, to) of the tile.
template <int kRows, int kVecs, class T>
NIBBLE_INLINE inline void AddValuesAt(const AttentionRow* rows, const Tile<T>& tile,
                                      int64_t head_dim, int64_t d, int from, int to,
                                      const float (*p)[kAttentionTile]) {
  Vec acc[kRows][kVecs];
  Unroll<kRows>([&](auto r) NIBBLE_INLINE {
    Unroll<kVecs>([&](auto i) NIBBLE_INLINE { acc[r][i] = Load(rows[r].out + d + i * kLanes); });
  });
  for (int position = from; position < to; ++position) {
    const T* value =
        tile.values[position / kKvBlock] + (position % kKvBlock) * head_dim + d;
    Unroll<kVecs>([&](auto i) NIBBLE_INLINE {
      const Vec v = LoadKv(value + i * kLanes);
      Unroll<kRows>([&](auto r) NIBBLE_INLINE {
        acc[r][i] = Fma(Set(p[r][position]), v, acc[r][i]);
      });
    });
  }
  Unroll<kRows>([&](auto r) NIBBLE_INLINE {
    Unroll<kVecs>([&](auto i) NIBBLE_INLINE { Store(rows[r].out + d + i * kLanes, acc[r][i]); });
  });
}

// The last 8 elements of a head whose size is an odd multiple of 8.
template <int kRows, class T>
NIBBLE_INLINE inline void AddValuesAt8(const AttentionRow* rows, const Tile<T>& tile,
                                       int64_t head_dim, int64_t d, int from, int to,
                                       const float (*p)[kAttentionTile]) {
  Vec acc[kRows];
  Unroll<kRows>([&](auto r) NIBBLE_INLINE { acc[r] = LoadFirst(rows[r].out + d, 8); });
  for (int position = from; position < to; ++position) {
    const Vec v =
        LoadKv8(tile.values[position / kKvBlock] + (position % kKvBlock) * head_dim + d);
    Unroll<kRows>([&](auto r) NIBBLE_INLINE { acc[r] = Fma(Set(p[r][position]), v, acc[r]); });
  }
  Unroll<kRows>([&](auto r) NIBBLE_INLINE { StoreFirst(rows[r].out + d, 8, acc[r]); });
}

template <int kRows, class T>
void AddValues(const AttentionRow* rows, const Tile<T>& tile, int32_t head_dim, int from, int to,
               const float (*p)[kAttentionTile]) {
  if (from >= to) return;
  constexpr int kStep = kAttentionVecs * kLanes;
  int64_t d = 0;
  for (; d + kStep <= head_dim; d += kStep) {
    AddValuesAt<kRows, kAttentionVecs>(rows, tile, head_dim, d, from, to, p);
  }
  for (; d + kLanes <= head_dim; d += kLanes) {
    AddValuesAt<kRows, 1>(rows, tile, head_dim, d, from, to, p);
  }
  if (d < head_dim) AddValuesAt8<kRows>(rows, tile, head_dim, d, from, to, p);
}

void ScaleRow(float* out, int32_t head_dim, float factor) {
  int32_t d = 0;
  for (; d + kLanes <= head_dim; d += kLanes) Store(out + d, Mul(Load(out + d), Set(factor)));
  if (d < head_dim) StoreFirst(out + d, 8, Mul(LoadFirst(out + d, 8), Set(factor)));
}

// A tile for kRows rows. Rows end at different positions: what all see is summed together, what
// lies before and after row by row, so that no row ever meets a value that it must not see.
template <int kRows, class T>
__attribute__((noinline)) void AttendTile(const Tile<T>& tile, int32_t head_dim, float scale,
                                          AttentionRow* rows) {
  float p[kRows][kAttentionTile] __attribute__((aligned(64)));
  Scores<kRows>(rows, tile, head_dim, scale, p);
  int from[kRows];
  int to[kRows];
  int shared_from = 0;
  int shared_to = kAttentionTile;
  for (int r = 0; r < kRows; ++r) {
    const int32_t low = rows[r].begin - tile.first;
    const int32_t high = rows[r].end - tile.first;
    from[r] = low < 0 ? 0 : low;
    to[r] = high > kAttentionTile ? kAttentionTile : high;
    shared_from = shared_from < from[r] ? from[r] : shared_from;
    shared_to = shared_to > to[r] ? to[r] : shared_to;
    if (from[r] >= to[r]) continue;
    const float correction = SoftmaxStep(p[r], from[r], to[r], &rows[r]);
    if (correction != 1.0F) ScaleRow(rows[r].out, head_dim, correction);
  }
  if (shared_from >= shared_to) {
    for (int r = 0; r < kRows; ++r) {
      AddValues<1>(rows + r, tile, head_dim, from[r], to[r], p + r);
    }
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    AddValues<1>(rows + r, tile, head_dim, from[r], shared_from, p + r);
  }
  AddValues<kRows>(rows, tile, head_dim, shared_from, shared_to, p);
  for (int r = 0; r < kRows; ++r) {
    AddValues<1>(rows + r, tile, head_dim, shared_to, to[r], p + r);
  }
}

template <class T>
void AttendTileRows(const Tile<T>& tile, int32_t head_dim, float scale, AttentionRow* rows,
                    int32_t count) {
  for (; count >= kAttentionRows; count -= kAttentionRows, rows += kAttentionRows) {
    AttendTile<kAttentionRows>(tile, head_dim, scale, rows);
  }
  Unroll<kAttentionRows - 1>([&](auto c) NIBBLE_INLINE {
    constexpr int kCount = decltype(c)::kConstant + 1;
    if (count == kCount) AttendTile<kCount>(tile, head_dim, scale, rows);
  });
}

// Converts a tile to fp32 for many rows.
struct KvPanel {
  float keys[kAttentionTile * kPanelHeadDim] __attribute__((aligned(64)));
  float values[kAttentionTile * kPanelHeadDim] __attribute__((aligned(64)));
};

Tile<float> ConvertTile(const Tile<uint16_t>& tile, int32_t head_dim, int first_block,
                        int last_block, KvPanel* panel) {
  const int64_t block_size = static_cast<int64_t>(head_dim) * kKvBlock;
  Tile<float> converted;
  converted.first = tile.first;
  for (int b = 0; b < kTileBlocks; ++b) {
    const int from = b < first_block ? first_block : (b > last_block ? last_block : b);
    converted.keys[b] = panel->keys + from * block_size;
    converted.values[b] = panel->values + from * block_size;
    if (from != b) continue;
    for (int64_t i = 0; i < block_size; i += kLanes) {
      Store(panel->keys + b * block_size + i, LoadHalf(tile.keys[b] + i));
      Store(panel->values + b * block_size + i, LoadHalf(tile.values[b] + i));
    }
  }
  return converted;
}

// All tiles for rows of one KV head, in rising order of their ends.
template <class T>
void AttendRows(const AttentionArgs& args, int32_t kv_head, AttentionRow* rows, int32_t count,
                KvPanel* panel) {
  const int32_t head_dim = args.cache.head_dim;
  const int64_t block_size = static_cast<int64_t>(head_dim) * kKvBlock;
  const int32_t begin = rows[0].begin;
  const int32_t end = rows[count - 1].end;
  for (int32_t first = begin / kAttentionTile * kAttentionTile; first < end;
       first += kAttentionTile) {
    const int32_t seen = (begin > first ? begin : first) / kKvBlock;
    const int32_t last = (end < first + kAttentionTile ? end : first + kAttentionTile) - 1;
    Tile<T> tile;
    tile.first = first;
    for (int b = 0; b < kTileBlocks; ++b) {
      int32_t index = first / kKvBlock + b;
      index = index < seen ? seen : (index > last / kKvBlock ? last / kKvBlock : index);
      const int64_t at =
          (static_cast<int64_t>(args.block_table[index]) * args.cache.kv_heads + kv_head) *
          block_size;
      tile.keys[b] = static_cast<const T*>(args.cache.keys) + at;
      tile.values[b] = static_cast<const T*>(args.cache.values) + at;
    }
    if constexpr (sizeof(T) == sizeof(uint16_t)) {
      if (count >= kPanelRows && head_dim <= kPanelHeadDim) {
        const int32_t first_block = first / kKvBlock;
        AttendTileRows(ConvertTile(tile, head_dim, seen - first_block,
                                   last / kKvBlock - first_block, panel),
                       head_dim, args.scale, rows, count);
        continue;
      }
    }
    AttendTileRows(tile, head_dim, args.scale, rows, count);
  }
  for (int32_t r = 0; r < count; ++r) ScaleRow(rows[r].out, head_dim, 1.0F / rows[r].total);
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
