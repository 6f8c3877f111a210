// W4A16 matrix products for any number of tokens, on the same packed weights as w4_decode.h: for
// GPUs before Hopper, on which neither that nor w4_wgmma.h runs.
//
// A block computes 128 rows for a tile of tokens. Activations go through shared memory in the order
// of the tensor cores' fragments; weights come from memory straight into registers, a slab ahead,
// and are widened exactly: (q - zero) * scale rounded once to the element type.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/element.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/w4_decode.h"

namespace nibble::cuda {

struct W4BatchParams {
  const uint8_t* slabs = nullptr;  // as W4DecodeParams
  int32_t rows = 0;
  int32_t columns = 0;  // a multiple of 8
  int32_t group = 128;  // 32, 64, 128; 0 = dense
  int32_t tokens = 0;
  const Real16* x = nullptr;  // [tokens, columns]
  DecodeOutput output = DecodeOutput::kHalf;
  Real16* y_half = nullptr;       // [tokens, rows], or [tokens, rows / 2] with kSiluMul
  float* y_float = nullptr;       // [tokens, rows]
  float* residual_out = nullptr;  // [tokens, rows]; no sums of squares are written
  const Real16* bias = nullptr;   // [rows] in packed order, or nullptr
};

[[nodiscard]] cudaError_t W4Batch(const W4BatchParams& params, const LaunchOptions& options);

}  // namespace nibble::cuda
