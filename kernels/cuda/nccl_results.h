// Kernels that take what NCCL leaves: sums over a group's ranks, and what it gathered.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/peer_exchange.h"

namespace nibble::cuda {

// residual += partial where another has taken the sum; one of the two is given.
struct AddPartialParams {
  float* residual = nullptr;
  const float* partial_float = nullptr;
  const Real16* partial_half = nullptr;
  int64_t count = 0;  // a multiple of 4
};
[[nodiscard]] cudaError_t AddPartial(const AddPartialParams& params, const LaunchOptions& options);

// The ranks' logits, gathered one rank behind the other, laid side by side.
struct JoinLogitsParams {
  const float* gathered = nullptr;  // [ranks][rank_stride]: rank r's [rows, begin[r+1] - begin[r]]
  int64_t rank_stride = 0;
  int32_t ranks = 0;                  // at most kPeersMax
  int32_t begin[kPeersMax + 1] = {};  // of each rank's share of the vocabulary
  int32_t rows = 0;
  float* logits = nullptr;  // [rows, vocab]
};
[[nodiscard]] cudaError_t JoinLogits(const JoinLogitsParams& params, const LaunchOptions& options);

}  // namespace nibble::cuda
