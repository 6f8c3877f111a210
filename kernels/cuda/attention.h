// Paged attention for prefill and decode alike: grouped queries, causal, sliding window.
//
// A tile is up to 16 rows, a row being one (token, query head) of one sequence and KV head: the m16
// of the tensor cores. The four warps of a block take the tile's KV blocks in turn and meet in
// shared memory; with splits > 1 several blocks share the tile's KV blocks, and the last one to
// finish adds their parts up in order, so that results do not vary from run to run.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/elementwise.h"

namespace nibble::cuda {

inline constexpr int32_t kAttentionRows = 16;
inline constexpr int32_t kAttentionSplitsMax = 32;

// Tokens of one sequence at consecutive positions; at most AttentionTileTokens of them.
struct AttentionTile {
  int32_t first_row = 0;  // input row of the step
  int32_t tokens = 0;     // 0: an empty tile
  int32_t first_position = 0;
  int32_t slot = 0;
};

[[nodiscard]] constexpr int32_t AttentionTileTokens(int32_t heads, int32_t kv_heads) {
  return kAttentionRows / (heads / kv_heads);
}
[[nodiscard]] constexpr bool AttentionSupports(int32_t heads, int32_t kv_heads, int32_t head_dim) {
  return heads / kv_heads <= kAttentionRows &&
         (head_dim == 16 || head_dim == 32 || head_dim == 64 || head_dim == 128);
}

// For steps of one token a sequence: attention norms and rotates queries and keys itself, and
// writes the token's key and value into the cache. Then q is the product's output as it is.
struct AttentionRotation {
  const float* cos = nullptr;  // [max_context, head_dim / 2]; nullptr: RopeAndStore came before
  const float* sin = nullptr;
  const half* q_norm = nullptr;  // [head_dim] or nullptr
  const half* k_norm = nullptr;
  float epsilon = 0;
};
[[nodiscard]] constexpr bool AttentionRotates(int32_t head_dim) {
  return head_dim == 64 || head_dim == 128;
}

struct AttentionParams {
  // [tokens, q_stride]: heads * head_dim queries, rotated; behind them keys and values.
  const half* q = nullptr;
  int64_t q_stride = 0;
  AttentionRotation rotation = {};
  half* out = nullptr;  // [tokens, heads * head_dim]
  KvLayer cache;
  const int32_t* block_tables = nullptr;  // [slots, table_size]
  int32_t table_size = 0;
  const AttentionTile* tiles = nullptr;  // [tile_count]
  int32_t tile_count = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t window = 0;  // 0 = all positions are seen
  float scale = 0;
  int32_t splits = 1;           // 1 … kAttentionSplitsMax
  float* scratch = nullptr;     // AttentionScratchFloats(…) where splits > 1
  int32_t* arrivals = nullptr;  // [tile_count * kv_heads], zero; left zero
};

[[nodiscard]] constexpr int64_t AttentionScratchFloats(int64_t tiles_times_splits, int32_t kv_heads,
                                                       int32_t head_dim) {
  return tiles_times_splits * kv_heads * kAttentionRows * (head_dim + 2);
}

// REQUIRES: AttentionSupports(heads, kv_heads, head_dim).
[[nodiscard]] cudaError_t Attention(const AttentionParams& params, const LaunchOptions& options);

}  // namespace nibble::cuda
