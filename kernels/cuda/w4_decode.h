// W4A16 matrix products for 1 to 16 tokens: weights stream once, at the speed of the memory.
//
// The floor is the weights' bytes; what bounds a step today is products and the way of activations
// to them (NOTES.md). Every warp feeds itself: its lane 0 issues bulk copies into the warp's own
// ring, the first of them before the previous kernel has ended (programmatic dependent launch).
// Each warp owns a range of k of every row tile; the eight partial sums of a row tile meet in
// shared memory in warp order, so results do not vary from run to run.
//
// A norm costs no kernel and no trip of its own. The product before it leaves, beside the residual
// stream, x = residual * norm_weight * scale with a scale that was known already: the inverse rms
// of the norm before. The product behind it multiplies its results by inverse rms / scale.
//
// Nor does a sum over ranks: whoever finishes rows of a product of a share stores them to all
// ranks, takes theirs, and leaves what one rank's product would.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/peer_exchange.h"
#include "kernels/layout/gpu_w4.h"
#include "kernels/layout/gpu_x.h"

namespace nibble::cuda {

// Inputs that stand for normed ones are held this much smaller: from one norm to the next the
// residual stream may grow 10^7 times before fp16 ends.
inline constexpr float kNormedInputFactor = 1.0f / 256;

enum class DecodeOutput : uint8_t {
  kHalf,         // y_half[token][row], of the element type
  kFloat,        // y_float[token][row]
  kSiluMul,      // rows r and r + 8 of a tile are gate and up: y_half[token][tile * 8 + r]
  kAddResidual,  // residual_out[token][row] += y
};

// How x stands for a normed input: x = residual * norm_weight * scale * kNormedInputFactor.
struct NormedInput {
  const float* scale = nullptr;        // [tokens]; nullptr: x is no normed input
  const float* square_sums = nullptr;  // [tokens, parts]: parts of the residual's sum of squares
  int32_t parts = 0;
  float epsilon = 0;
  float* inverse_rms_out = nullptr;  // [tokens]: the scale of the next normed input
};

// What kAddResidual leaves for the next norm.
struct NextInput {
  Real16* x = nullptr;                  // [tokens, rows]; nullptr: nothing is left
  const Real16* norm_weight = nullptr;  // [rows]
  const float* scale = nullptr;         // [tokens]
  float* square_sums = nullptr;         // [tokens, row tiles]
  layout::GpuFragmentOrder order = {};  // of x
};

struct W4DecodeParams {
  // Weights: slabs as in kernels/layout/gpu_w4.h, or fragments when group == 0 (dense).
  const uint8_t* slabs = nullptr;
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t group = 128;  // 32, 64, 128; 0 = dense

  int32_t tokens = 0;                     // 1 … 16
  const Real16* x = nullptr;              // [tokens, columns]
  layout::GpuFragmentOrder x_order = {};  // of x; what GpuFragments says, or as it is
  NormedInput normed;

  DecodeOutput output = DecodeOutput::kHalf;
  Real16* y_half = nullptr;
  layout::GpuFragmentOrder y_order = {};  // of y_half, with kSiluMul
  float* y_float = nullptr;
  float* residual_out = nullptr;  // [tokens, rows]
  NextInput next;                 // with kAddResidual
  const Real16* bias = nullptr;   // [rows] in packed order, or nullptr

  // With kAddResidual, ranks != 0: y is the sum over ranks. Every rank launches the same product
  // with as many blocks each time, and all blocks of all ranks must come to run at the same time.
  // Words are ProductExchangeWords(tokens, rows) at least.
  PeerExchange exchange = {};

  bool dependent_launch = true;  // programmatic dependent launch on the stream
  Element element = Element::kHalf;
  // Cycles from the first copies of one slot of a ring to the next one's; 0: as it is best for
  // whole matrices.
  int32_t pace = 0;
};

// What every kernel of a decode step asks for: one block a multiprocessor, of at most half
// a multiprocessor's registers, and this much shared memory. Exactly two such blocks fit a
// multiprocessor: a kernel's blocks and those of the kernel behind it, which is filling its ring
// meanwhile, always share the multiprocessors one to one. With smaller or fewer blocks two of one
// launch meet on a multiprocessor and leave another without.
inline constexpr int32_t kDecodeSharedBytes = 112 * 1024;

// REQUIRES: columns a multiple of 8, tokens 1 … 16, 16-byte aligned pointers. Graph-capturable.
[[nodiscard]] cudaError_t W4Decode(const W4DecodeParams& params, int32_t multiprocessors,
                                   cudaStream_t stream);

// Packs logical q [rows, columns] (0…15), zeros and scales [rows, columns / group] on the device.
// With `pair_rows`, rows holds gate [rows / 2] then up [rows / 2] and tiles hold 8 matching rows of
// both. Dense: values [rows, columns].
struct PackW4Params {
  const uint8_t* q = nullptr;
  const uint8_t* zeros = nullptr;
  const half* scales = nullptr;
  const Real16* dense = nullptr;  // group == 0
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t group = 128;
  bool pair_rows = false;
  uint8_t* slabs = nullptr;
};
[[nodiscard]] cudaError_t PackW4(const PackW4Params& params, cudaStream_t stream);

// Bytes of the packed form; group 0 is dense.
[[nodiscard]] int64_t W4DecodeBytes(int32_t rows, int32_t columns, int32_t group);

}  // namespace nibble::cuda
