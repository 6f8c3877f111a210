// What activations in fixed point (kernels/layout/gpu_x.h) say.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cuda/element.h"
#include "kernels/layout/gpu_x.h"

namespace nibble::cuda {

// Numbers in fixed point, [tokens, columns], and the sums beside them, [tokens, slabs].
struct FixedNumbers {
  std::vector<double> values, sums, sums_of_values;

  FixedNumbers(const std::vector<Real16>& x, const std::vector<float>& scales, int tokens,
               int columns) {
    const auto* bytes = reinterpret_cast<const int8_t*>(x.data());
    const int ordered_tokens = layout::GpuOrderedTokens(tokens), slabs = layout::GpuSlabs(columns);
    sums_of_values.resize(static_cast<size_t>(tokens * slabs));
    for (int t = 0; t < tokens; ++t) {
      for (int slab = 0; slab < slabs; ++slab) {
        sums.push_back(scales[Place(layout::GpuFixedScaleIndex(t, slab, true, ordered_tokens))]);
      }
      for (int k = 0; k < columns; ++k) {
        constexpr int kPlaces[] = {0, 2, 1, 3};
        const auto byte = [&](bool high) {
          return bytes[layout::GpuFixedIndex(t, k / 4 * 4, high, ordered_tokens) + kPlaces[k % 4]];
        };
        const double scale =
            scales[Place(layout::GpuFixedScaleIndex(t, k / 128, false, ordered_tokens))];
        values.push_back(scale * (256 * byte(true) + byte(false)));
        sums_of_values[Place(t * slabs + k / 128)] += values.back();
      }
    }
  }

 private:
  static size_t Place(int64_t index) { return static_cast<size_t>(index); }
};

}  // namespace nibble::cuda
