// The addition behind every sum over ranks.
#pragma once

#include <cstddef>
#include <span>

namespace nibble::collectives {

// sum[i] += part[i].
inline void AddTo(std::span<float> sum, const float* __restrict part) {
  float* __restrict out = sum.data();
  for (size_t i = 0; i < sum.size(); ++i) out[i] += part[i];
}

}  // namespace nibble::collectives
