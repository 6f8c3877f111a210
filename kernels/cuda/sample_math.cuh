// The sampler's numbers, bit for bit those of the host's (worker/execution/cpu/portable_math.h,
// random.h): compile without contraction of products and sums.
#pragma once

#include <cstdint>

namespace nibble::cuda {

inline constexpr double kGumbelMax = 36.75;  // above -log(-log(1 - 2^-53))

// ln x. REQUIRES: x is positive, normal and finite.
__device__ __forceinline__ double PortableLog(double x) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x));
  const int64_t exponent = static_cast<int64_t>(bits - kSqrtHalf) >> 52;
  const double m =
      __longlong_as_double(static_cast<int64_t>(bits - (static_cast<uint64_t>(exponent) << 52)));
  const double s = (m - 1.0) / (m + 1.0);
  const double s2 = s * s;
  double p = 1.0 / 19.0;
  p = p * s2 + 1.0 / 17.0;
  p = p * s2 + 1.0 / 15.0;
  p = p * s2 + 1.0 / 13.0;
  p = p * s2 + 1.0 / 11.0;
  p = p * s2 + 1.0 / 9.0;
  p = p * s2 + 1.0 / 7.0;
  p = p * s2 + 1.0 / 5.0;
  p = p * s2 + 1.0 / 3.0;
  p = p * s2 + 1.0;
  return static_cast<double>(exponent) * 0.69314718055994530942 + 2.0 * s * p;
}

// e^x; 0 below -700. REQUIRES: x <= 700.
__device__ __forceinline__ double PortableExp(double x) {
  if (!(x > -700.0)) return 0.0;
  constexpr double kLn2 = 0.69314718055994530942;
  constexpr double kLog2E = 1.4426950408889634074;
  constexpr double kLn2High = 0x1.62e42fefp-1;
  constexpr double kLn2Low = kLn2 - kLn2High;
  constexpr double kRound = 0x1.8p52;
  const double n = (x * kLog2E + kRound) - kRound;
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double p = 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  const auto exponent =
      static_cast<int64_t>(static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52);
  return p * __longlong_as_double(exponent);
}

// e^-x in units of 2^-31. REQUIRES: 0 <= x <= kWeightReach.
inline constexpr float kWeightReach = 21.0f;
inline constexpr uint32_t kWeightOne = 1u << 31;
__device__ __forceinline__ uint32_t WeightUnits(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kRound = 0x1.8p23f;
  const float y = x * kLog2E;
  const float n = (y + kRound) - kRound;
  const float z = (y - n) * -0.69314718f;
  float p = 1.0f / 720.0f;
  p = p * z + 1.0f / 120.0f;
  p = p * z + 1.0f / 24.0f;
  p = p * z + 1.0f / 6.0f;
  p = p * z + 0.5f;
  p = p * z + 1.0f;
  p = p * z + 1.0f;
  const uint32_t exponent = static_cast<uint32_t>(127 + 31 - static_cast<int32_t>(n)) << 23;
  return static_cast<uint32_t>(p * __uint_as_float(exponent));
}

// Element token_id of the SplitMix64 sequence from `stream`: 52 bits.
__device__ __forceinline__ uint64_t UniformBits(uint64_t stream, int32_t token_id) {
  uint64_t z =
      stream + (static_cast<uint64_t>(static_cast<uint32_t>(token_id)) + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (z ^ (z >> 31)) >> 12;
}
// Bits k stand for (k + 1/2) / 2^52.
__device__ __forceinline__ double GumbelFromBits(uint64_t bits) {
  return -PortableLog(-PortableLog((static_cast<double>(bits) + 0.5) * 0x1p-52));
}
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
