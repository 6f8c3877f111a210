// W4A16 matrix products of many tokens: slices of the weights are widened to fp16 in scratch memory
// that stays in the L2 or near it, and multiplied by cuBLAS.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include "kernels/cuda/w4_batch.h"

namespace nibble::cuda {

inline constexpr int64_t kLargeScratchBytes = int64_t{64} << 20;
inline constexpr int32_t kLargeSliceRowsMax = 8192;

// Device memory that a product needs beside its inputs and outputs. Borrowed; one stream.
struct LargeScratch {
  cublasHandle_t handle = nullptr;  // set to the stream
  half* weights = nullptr;          // kLargeScratchBytes
  half* gate_up = nullptr;          // [tokens, kLargeSliceRowsMax]
};

// REQUIRES: group != 0, no bias, columns * 256 bytes within kLargeScratchBytes. Every output kind.
// CUBLAS_STATUS_EXECUTION_FAILED also stands for an error of a launch.
[[nodiscard]] cublasStatus_t W4Large(const W4BatchParams& params, const LargeScratch& scratch,
                                     cudaStream_t stream);

}  // namespace nibble::cuda
