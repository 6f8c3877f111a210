// Random inputs for checks, and how a result is compared with a plain computation in double.
#pragma once

#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

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
inline std::vector<half> Halves(const std::vector<float>& values) {
  std::vector<half> halves;
  for (const float value : values) halves.push_back(__float2half(value));
  return halves;
}
inline std::vector<half> NormalHalves(size_t count, float deviation) {
  return Halves(Normal(count, deviation));
}
inline double Double(half value) { return static_cast<double>(__half2float(value)); }

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
