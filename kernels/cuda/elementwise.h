// The small operations of a decoder step, one kernel each. All are graph-capturable; pointers are
// 16-byte aligned, device memory and borrowed; `tokens` rows lie side by side.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/w4_decode.h"

namespace nibble::cuda {

struct LaunchOptions {
  cudaStream_t stream = nullptr;
  bool dependent = false;  // programmatic dependent launch
  Element element = Element::kHalf;
};

// residual[row] = table[id]. An id below zero stands for last_tokens[-1 - id].
struct EmbedParams {
  const Real16* table = nullptr;         // [vocab, hidden]
  const int32_t* token_ids = nullptr;    // [tokens]
  const int32_t* last_tokens = nullptr;  // [slots]
  int32_t tokens = 0;
  int32_t hidden = 0;
  float* residual = nullptr;  // [tokens, hidden]
  // What the first norm's product takes in, as W4Decode leaves it; x == nullptr: nothing. Sums of
  // squares have one part, and the scale is written.
  NextInput next = {};
  float epsilon = 0;
  float* scale_out = nullptr;  // [tokens]
};
[[nodiscard]] cudaError_t Embed(const EmbedParams& params, const LaunchOptions& options);

// out[i] = residual[rows[i]] / rms * weight; rows == nullptr: every row in order.
struct RmsNormParams {
  const float* residual = nullptr;  // [any, hidden]
  const int32_t* rows = nullptr;    // [tokens]
  const Real16* weight = nullptr;   // [hidden]
  int32_t tokens = 0;
  int32_t hidden = 0;
  float epsilon = 0;
  Real16* out = nullptr;  // [tokens, hidden]
};
[[nodiscard]] cudaError_t RmsNorm(const RmsNormParams& params, const LaunchOptions& options);

// residual += projected, `count` values, a multiple of 4.
struct AddParams {
  float* residual = nullptr;
  const float* projected = nullptr;
  int64_t count = 0;
};
[[nodiscard]] cudaError_t AddResidual(const AddParams& params, const LaunchOptions& options);

// Those of a step's tokens that its last kernels go on with, side by side.
struct KeepRowsParams {
  const int32_t* rows = nullptr;  // [count]
  int32_t count = 0;
  int32_t hidden = 0;               // a multiple of 4
  int32_t columns = 0;              // a multiple of 8
  const float* residual = nullptr;  // [any, hidden]
  const Real16* x = nullptr;        // [any, columns]
  float epsilon = 0;
  float* residual_out = nullptr;     // [count, hidden]
  Real16* x_out = nullptr;           // [count, columns], not x
  float* inverse_rms_out = nullptr;  // [count], of the residual
};
[[nodiscard]] cudaError_t KeepRows(const KeepRowsParams& params, const LaunchOptions& options);

// out[token][16 t' + …]: gate and up rows come in tiles of eight and eight, as PackW4 pairs them.
struct SiluMulParams {
  const Real16* gate_up = nullptr;  // [tokens, 2 * ffn]
  int32_t tokens = 0;
  int32_t ffn = 0;         // a multiple of 8
  Real16* out = nullptr;   // [tokens, out_stride]
  int32_t out_stride = 0;  // 0 = ffn
};
[[nodiscard]] cudaError_t SiluMul(const SiluMulParams& params, const LaunchOptions& options);

// One layer's part of the KV cache: keys, and values, [block][kv head][16 positions * head_dim],
// the innermost as attention_layout.h says.
struct KvLayer {
  Real16* keys = nullptr;
  Real16* values = nullptr;
};

// Norms (where norm weights are given) and rotates query and key heads, and writes keys and values
// into the cache. Queries are rotated in place.
struct RopeParams {
  Real16* qkv = nullptr;  // [tokens, (heads + 2 * kv_heads) * head_dim]
  int32_t tokens = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  const int32_t* positions = nullptr;  // [tokens]
  const int32_t* blocks = nullptr;     // [tokens]: KV block of the position
  const float* cos = nullptr;          // [max_context, head_dim / 2]
  const float* sin = nullptr;
  const Real16* q_norm = nullptr;  // [head_dim], both or neither
  const Real16* k_norm = nullptr;
  float epsilon = 0;
  KvLayer cache;
};
[[nodiscard]] cudaError_t RopeAndStore(const RopeParams& params, const LaunchOptions& options);

// Copies whole KV blocks; every layer's keys and values lie `layer_bytes` apart.
struct CopyBlocksParams {
  uint8_t* cache = nullptr;
  int64_t block_bytes = 0;  // of one layer's keys or values; a multiple of 16
  int64_t part_bytes = 0;   // from one layer's keys to its values, and on to the next layer's keys
  int32_t parts = 0;        // 2 * layers
  const int32_t* from_to = nullptr;  // [copies][2]
  int32_t copies = 0;
};
[[nodiscard]] cudaError_t CopyBlocks(const CopyBlocksParams& params, const LaunchOptions& options);

// target[index] = value for pairs (index, value); a negative index is left out.
struct ScatterParams {
  const int32_t* pairs = nullptr;  // [count][2]
  int32_t count = 0;
  int32_t* target = nullptr;
};
[[nodiscard]] cudaError_t Scatter(const ScatterParams& params, const LaunchOptions& options);

// Random q and zeros (0…15), and numbers uniform in middle ± amplitude, for measuring without
// a checkpoint.
[[nodiscard]] cudaError_t FillRandomBytes(uint8_t* nibbles, int64_t count, uint32_t seed,
                                          cudaStream_t stream);
[[nodiscard]] cudaError_t FillRandomReals(Real16* reals, int64_t count, float middle,
                                          float amplitude, uint32_t seed,
                                          const LaunchOptions& options);

}  // namespace nibble::cuda
