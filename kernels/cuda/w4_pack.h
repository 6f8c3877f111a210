// Packing of weights as checkpoints store them, on the device.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/elementwise.h"

namespace nibble::cuda {

// Rows of a fused matrix in AutoAWQ's gemm layout: eight rows a word, in the order of its nibbles.
struct GemmPart {
  const uint32_t* qweight = nullptr;  // [columns, rows / 8]
  const uint32_t* qzeros = nullptr;   // [columns / group, rows / 8]
  const half* scales = nullptr;       // [columns / group, rows]
  int32_t rows = 0;                   // a multiple of 8
};
inline constexpr int32_t kGemmPartsMax = 3;

struct PackGemmParams {
  GemmPart parts[kGemmPartsMax];  // one behind the other
  int32_t rows = 0;               // of all parts
  int32_t columns = 0;            // a multiple of group
  int32_t group = 128;            // 32, 64, 128
  bool pair_rows = false;         // as PackW4Params
  uint8_t* slabs = nullptr;
  int32_t* not_finite = nullptr;  // becomes 1 where a scale is NaN or infinite
};
[[nodiscard]] cudaError_t PackGemm(const PackGemmParams& params, cudaStream_t stream);

// *not_finite becomes 1 where one of the values is NaN or infinite.
[[nodiscard]] cudaError_t CheckFinite(const Real16* values, int64_t count, int32_t* not_finite,
                                      const LaunchOptions& options);

}  // namespace nibble::cuda
