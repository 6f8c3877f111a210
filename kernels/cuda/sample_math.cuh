// The sampler's numbers on the device, and which of two tokens is the sample.
#pragma once

#include <cstdint>

#include "kernels/sampling/portable_math.h"
#include "kernels/sampling/random.h"

namespace nibble::cuda {

using sampling::GumbelFromBits;
using sampling::kGumbelMax;
using sampling::kWeightOne;
using sampling::kWeightReach;
using sampling::PortableExp;
using sampling::PortableLog;
using sampling::UniformBits;
using sampling::WeightUnits;

__device__ __forceinline__ double Gumbel(uint64_t stream, int32_t token_id) {
  return GumbelFromBits(UniformBits(stream, token_id));
}

// Bits below the bound of floor(gap) give a gumbel that is not above the gap: P(gumbel > d) =
// 1 - exp(-e^-d) <= e^-d, and 1.001 outweighs all rounding. So most tokens need no logarithm.
inline constexpr int32_t kGumbelBounds = 37;
__device__ __forceinline__ void FillGumbelBounds(uint64_t* bounds) {
  if (threadIdx.x < kGumbelBounds) {
    const double below = 1.0 - 1.001 * PortableExp(-static_cast<double>(threadIdx.x));
    bounds[threadIdx.x] = threadIdx.x == 0 ? 0 : static_cast<uint64_t>(below * 0x1p52);
  }
}
// Whether a token that stands `gap` behind the best cannot come before it.
__device__ __forceinline__ bool StaysBehind(double gap, uint64_t bits, const uint64_t* bounds) {
  return gap > kGumbelMax || (gap >= 1 && bits < bounds[static_cast<int32_t>(gap)]);
}

// Calls take(best, other) where `other` is the one of two scored tokens that is sampled. A token_id
// below 0: none.
template <typename Scored, typename Take>
__device__ __forceinline__ void TakeBetter(Scored* best, const Scored& other, const Take& take) {
  if (other.token_id < 0) return;
  if (best->token_id < 0 || other.score > best->score ||
      (other.score == best->score && other.token_id < best->token_id)) {
    take(best, other);
  }
}

}  // namespace nibble::cuda
