// exp and log of doubles from plain additions and multiplications in a fixed order: the C
// library's pick their instructions by CPU, and ranks on different machines must sample the same
// token from the same logits, on a GPU too. Relative error below 1e-13. Compile without contraction
// of products and sums.
#pragma once

#include <bit>
#include <cstdint>

namespace nibble::sampling {

inline constexpr double kLn2 = 0.69314718055994530942;

// e^x; 0 below -700. REQUIRES: x <= 700 (NaN gives anything).
[[nodiscard]] constexpr double PortableExp(double x) {
  if (!(x > -700.0)) return 0.0;
  constexpr double kLog2E = 1.4426950408889634074;
  constexpr double kLn2High = 0x1.62e42fefp-1;  // 32 bits: n * kLn2High is exact
  constexpr double kLn2Low = kLn2 - kLn2High;
  constexpr double kRound = 0x1.8p52;  // adding and subtracting it rounds to an integer
  const double n = (x * kLog2E + kRound) - kRound;
  const double r = (x - n * kLn2High) - n * kLn2Low;
  double p = 1.0 / 479001600.0;  // 1 / 12!
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
  const auto exponent = static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52;
  return p * std::bit_cast<double>(exponent);
}

// The natural logarithm. REQUIRES: x is positive, normal and finite.
[[nodiscard]] constexpr double PortableLog(double x) {
  constexpr uint64_t kSqrtHalf =
      0x3fe6a09e667f3bcd;  // the mantissa m lies in sqrt(1/2) ... sqrt(2)
  const auto bits = std::bit_cast<uint64_t>(x);
  const int64_t exponent = static_cast<int64_t>(bits - kSqrtHalf) >> 52;
  const double m = std::bit_cast<double>(bits - (static_cast<uint64_t>(exponent) << 52));
  // log m = 2 artanh(s); near 1 the error stays relative because m - 1 is exact.
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
  return static_cast<double>(exponent) * kLn2 + 2.0 * s * p;
}

// e^-x in units of 2^-31, for the sampler's filters: sums of whole numbers do not depend on their
// order, so that a GPU's blocks and a CPU's loop come to the same ones. Relative error below 1e-6
// and a unit. REQUIRES: 0 <= x <= 21, which leaves 1 at least.
inline constexpr float kWeightReach = 21.0f;
inline constexpr uint32_t kWeightOne = 1u << 31;
[[nodiscard]] constexpr uint32_t WeightUnits(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kRound = 0x1.8p23f;  // adding and subtracting it rounds to an integer
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
  const auto exponent = static_cast<uint32_t>(127 + 31 - static_cast<int32_t>(n)) << 23;
  return static_cast<uint32_t>(p * std::bit_cast<float>(exponent));
}

}  // namespace nibble::sampling
