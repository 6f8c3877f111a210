// W4A16 matrix products for 1 to 16 tokens: weights stream once, at the speed of the memory.
//
// Bound: bytes. Every warp feeds itself: its lane 0 issues bulk copies into the warp's own ring,
// the first of them before the previous kernel has ended (programmatic dependent launch). Each warp
// owns a range of k, so its activations stay in registers; the eight partial sums of a row meet in
// shared memory in warp order, so results do not vary from run to run.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/layout/gpu_w4.h"

namespace nibble::cuda {

// How many blocks a launch uses and thus how many partial sums of squares a token has.
inline constexpr int32_t kDecodeBlocksMax = 256;

enum class DecodeInput : uint8_t {
  kHalf,     // x_half as it is
  kRmsNorm,  // residual * rsqrt(mean of squares + epsilon) * norm_weight
};
enum class DecodeOutput : uint8_t {
  kHalf,         // y_half[token][row]
  kFloat,        // y_float[token][row]
  kSiluMul,      // rows r and r + 8 of a tile are gate and up: y_half[token][tile * 8 + r]
  kAddResidual,  // residual_out[token][row] += y, and its partial sums of squares
};

struct W4DecodeParams {
  // Weights: slabs as in kernels/layout/gpu_w4.h, or fp16 fragments when group == 0 (dense).
  const uint8_t* slabs = nullptr;
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t group = 128;  // 32, 64, 128; 0 = dense fp16

  int32_t tokens = 0;  // 1 … 16
  DecodeInput input = DecodeInput::kHalf;
  const half* x_half = nullptr;        // [tokens, columns]
  const float* residual = nullptr;     // [tokens, columns]
  const half* norm_weight = nullptr;   // [columns]
  const float* square_sums = nullptr;  // [tokens, square_parts]: parts of the sum of squares
  int32_t square_parts = 0;
  float epsilon = 0;

  DecodeOutput output = DecodeOutput::kHalf;
  half* y_half = nullptr;
  float* y_float = nullptr;
  float* residual_out = nullptr;     // [tokens, rows]
  float* square_sums_out = nullptr;  // [tokens, blocks of this launch]
  const half* bias = nullptr;        // [rows] in packed order, or nullptr
  bool dependent_launch = true;      // programmatic dependent launch on the stream
};

// How a launch is laid out: a row of weights is split over the blocks of a cluster so that every
// warp's activations fit its registers (512 columns a warp, 256 above 8 tokens).
struct DecodeGrid {
  int32_t blocks = 0;          // also how many parts a sum of squares has
  int32_t cluster_blocks = 1;  // 1, 2, 4 or 8; more is refused
};
[[nodiscard]] DecodeGrid W4DecodeGrid(int32_t rows, int32_t columns, int32_t tokens,
                                      int32_t multiprocessors);

// REQUIRES: columns a multiple of 8 and at most 32768 (16384 above 8 tokens), tokens 1 … 16,
// 16-byte aligned pointers. Graph-capturable.
[[nodiscard]] cudaError_t W4Decode(const W4DecodeParams& params, int32_t multiprocessors,
                                   cudaStream_t stream);

// Packs logical q [rows, columns] (0…15), zeros and scales [rows, columns / group] on the device.
// With `pair_rows`, rows holds gate [rows / 2] then up [rows / 2] and tiles hold 8 matching rows of
// both. Dense: values fp16 [rows, columns].
struct PackW4Params {
  const uint8_t* q = nullptr;
  const uint8_t* zeros = nullptr;
  const half* scales = nullptr;
  const half* dense = nullptr;  // group == 0
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t group = 128;
  bool pair_rows = false;
  uint8_t* slabs = nullptr;
};
[[nodiscard]] cudaError_t PackW4(const PackW4Params& params, cudaStream_t stream);

// Bytes of the packed form; group 0 is dense fp16.
[[nodiscard]] int64_t W4DecodeBytes(int32_t rows, int32_t columns, int32_t group);

}  // namespace nibble::cuda
