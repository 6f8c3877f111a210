// Random inputs for checks, and how a result is compared with a plain computation in double.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/element.h"

namespace nibble::cuda {

inline std::mt19937& Random() {
  static std::mt19937 random(7);
  return random;
}

inline std::vector<float> Normal(size_t count, float deviation) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(Random());
  return values;
}
// The element type in which checks work: a program goes through them once with each.
inline Element& Tested() {
  static Element element = Element::kHalf;
  return element;
}
inline const char* TestedName() { return Tested() == Element::kHalf ? "fp16" : "bf16"; }
// What numbers of eleven significant bits may differ by, for numbers of the tested type.
inline double Limit(double of_half) { return Tested() == Element::kHalf ? of_half : 8 * of_half; }

inline Real16 ToReal(float value) {
  if (Tested() == Element::kHalf) return {__half_as_ushort(__float2half(value))};
  return {__bfloat16_as_ushort(__float2bfloat16(value))};
}
inline float ToFloat(Real16 value) {
  if (Tested() == Element::kHalf) return __half2float(__ushort_as_half(value.bits));
  return __bfloat162float(__ushort_as_bfloat16(value.bits));
}
inline std::vector<Real16> NormalReals(size_t count, float deviation) {
  std::vector<Real16> reals;
  for (const float value : Normal(count, deviation)) reals.push_back(ToReal(value));
  return reals;
}
inline double Double(Real16 value) { return static_cast<double>(ToFloat(value)); }

inline bool Report(const std::string& name, const std::vector<double>& want,
                   const std::vector<double>& got, double limit) {
  double difference = 0, norm = 1e-30;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = want[i] - got[i];
    difference += std::isfinite(d) ? d * d : 1e30;
    norm += want[i] * want[i];
  }
  const double error = std::sqrt(difference / norm);
  const bool ok = want.size() == got.size() && error < limit;
  std::printf("%-4s %-64s error %.2e\n", ok ? "ok" : "FAIL", name.c_str(), error);
  return ok;
}

}  // namespace nibble::cuda
