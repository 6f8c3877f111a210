// Paged attention for prefill and decode alike: grouped queries, causal, sliding window.
//
// Two kernels. One streams keys and values: a unit is up to 16 rows, a row being one (token, query
// head) of one sequence and KV head, against a range of KV blocks; decode steps and small pieces of
// prompts go there. The other (attention_prompt.cu) takes tiles of up to 128 rows on Hopper's
// warpgroup products; prompts go there. Results do not vary from run to run.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/elementwise.h"

namespace nibble::cuda {

inline constexpr int32_t kAttentionRows = 16;         // of a unit
inline constexpr int32_t kAttentionPromptRows = 128;  // of a tile of the prompt kernel
inline constexpr int32_t kAttentionBlocks = 132;      // that PlanAttention reckons with
inline constexpr int32_t kAttentionUnitsExtraMax = 128;

// Tokens of one sequence at consecutive positions.
struct AttentionTile {
  int32_t first_row = 0;  // input row of the step
  int32_t tokens = 0;
  int32_t first_position = 0;
  int32_t slot = 0;
};

// Tokens of one sequence at consecutive positions against some of its KV blocks.
struct alignas(16) AttentionUnit {
  int32_t first_row = 0;  // input row of the step
  int32_t first_position = 0;
  int32_t slot = 0;
  int16_t tokens = 0;  // at most AttentionTileTokens; 0: this unit and those behind it are empty
  int16_t parts = 1;   // units that share the tokens' KV blocks
  int32_t begin_block = 0;
  int32_t end_block = 0;  // may lie behind what the tokens see
  int32_t place = 0;      // with parts > 1: of part 0 in the scratch memory
  int32_t part = 0;
};
static_assert(sizeof(AttentionUnit) == 32);

[[nodiscard]] constexpr int32_t AttentionTileTokens(int32_t heads, int32_t kv_heads) {
  return kAttentionRows / (heads / kv_heads);
}
[[nodiscard]] constexpr int32_t AttentionPromptTokens(int32_t heads, int32_t kv_heads) {
  return kAttentionPromptRows / (heads / kv_heads);
}
[[nodiscard]] constexpr bool AttentionSupports(int32_t heads, int32_t kv_heads, int32_t head_dim) {
  return heads / kv_heads <= kAttentionRows &&
         (head_dim == 16 || head_dim == 32 || head_dim == 64 || head_dim == 128);
}

// Whether the prompt kernel takes tiles of such heads.
[[nodiscard]] constexpr bool AttentionTakesPrompts(int32_t head_dim) {
  return head_dim == 64 || head_dim == 128;
}

// Whether results of steps of one token a sequence may be left in fixed point: of fp16.
[[nodiscard]] constexpr bool AttentionLeavesFixed(int32_t heads, int32_t kv_heads,
                                                  int32_t head_dim) {
  return head_dim == 128 && heads / kv_heads <= 8;
}

// For steps of one token a sequence: attention norms and rotates queries and keys itself, and
// writes the token's key and value into the cache. Then q is the product's output as it is.
struct AttentionRotation {
  const float* cos = nullptr;  // [max_context, head_dim / 2]; nullptr: RopeAndStore came before
  const float* sin = nullptr;
  const Real16* q_norm = nullptr;  // [head_dim] or nullptr
  const Real16* k_norm = nullptr;
  float epsilon = 0;
  // In the place of q: parts that it is the sum of (w4_wgmma.h), so far apart; nullptr: none.
  const float* parts = nullptr;
  int32_t part_count = 0;
  int64_t part_stride = 0;
};

struct AttentionParams {
  // [tokens, q_stride]: heads * head_dim queries, rotated; behind them keys and values.
  const Real16* q = nullptr;
  int64_t q_stride = 0;
  AttentionRotation rotation = {};
  Real16* out = nullptr;  // [tokens, heads * head_dim]
  // Where results are left instead, as kernels/layout/gpu_x.h has them for weights of
  // `ordered_group`; nullptr: in `out`. With tiles, the group must divide head_dim.
  Real16* ordered = nullptr;
  int32_t ordered_group = 128;
  int32_t ordered_tokens = 0;
  // Not null: `ordered` is in fixed point, with these scales. With a rotation, where
  // AttentionLeavesFixed says so.
  float* ordered_scales = nullptr;
  layout::GpuFragmentOrder fragments = {};  // of `out`, without tiles
  KvLayer cache;
  const int32_t* block_tables = nullptr;  // [slots, table_size]
  int32_t table_size = 0;
  const AttentionUnit* units = nullptr;  // [unit_count], from PlanAttention; then empty ones
  int32_t unit_count = 0;
  const AttentionTile* tiles = nullptr;  // [tile_count]: of AttentionPromptTokens at most
  int32_t tile_count = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t window = 0;  // 0 = all positions are seen
  float scale = 0;
  // Of the kernel that streams. Where units have parts, all must fit the device at once, two a
  // multiprocessor: they wait for one another.
  int32_t blocks = kAttentionBlocks;
  float* scratch = nullptr;  // AttentionScratchFloats(AttentionPlaces(…), …), zero; left zero
};

[[nodiscard]] constexpr int64_t AttentionScratchFloats(int64_t places, int32_t kv_heads,
                                                       int32_t head_dim) {
  return places * kv_heads * kAttentionRows * head_dim * 2;
}

// REQUIRES: AttentionSupports(heads, kv_heads, head_dim).
[[nodiscard]] cudaError_t Attention(const AttentionParams& params, const LaunchOptions& options);

}  // namespace nibble::cuda
