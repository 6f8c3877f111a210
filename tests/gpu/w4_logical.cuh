// Random logical weights and their plain product in double, for checks of matrix products.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/cuda/w4_decode.h"
#include "tests/gpu/comparison.h"
#include "tests/gpu/device_array.h"

namespace nibble::cuda {

__device__ inline float Wide(Real16 x, Element element) {
  return element == Element::kHalf ? __half2float(__ushort_as_half(x.bits))
                                   : __bfloat162float(__ushort_as_bfloat16(x.bits));
}

// y[token][row] in double from the logical form.
__global__ void ReferenceKernel(const uint8_t* q, const uint8_t* zeros, const half* scales,
                                const Real16* dense, const Real16* x, int rows, int columns,
                                int group, Element element, double* y) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  const int token = blockIdx.y;
  if (row >= rows) return;
  double sum = 0;
  for (int k = 0; k < columns; ++k) {
    double w;
    if (group == 0) {
      w = Wide(dense[static_cast<int64_t>(row) * columns + k], element);
    } else {
      const int64_t g = static_cast<int64_t>(row) * (columns / group) + k / group;
      w = (static_cast<int>(q[static_cast<int64_t>(row) * columns + k]) - zeros[g]) *
          static_cast<double>(__half2float(scales[g]));
    }
    sum += w * static_cast<double>(Wide(x[static_cast<int64_t>(token) * columns + k], element));
  }
  y[static_cast<int64_t>(token) * rows + row] = sum;
}

// Weights on the device: logical, and packed for the kernels.
class RandomMatrix {
 public:
  // With `pair_rows`, the first half of the rows are gates and the second ups.
  RandomMatrix(int rows, int columns, int group, bool pair_rows)
      : rows_(rows),
        columns_(columns),
        group_(group),
        q_(group == 0 ? 1 : Count()),
        zeros_(group == 0 ? 1 : Count() / group),
        scales_(group == 0 ? 1 : Count() / group),
        dense_(group == 0 ? Count() : 1),
        slabs_(W4DecodeBytes(rows, columns, group)) {
    std::mt19937 random(static_cast<uint32_t>(rows * 31 + columns + group));
    if (group == 0) {
      std::normal_distribution<float> normal(0, 0.02f);
      std::vector<Real16> dense(Count());
      for (auto& value : dense) value = ToReal(normal(random));
      dense_.Set(dense);
    } else {
      std::vector<uint8_t> q(Count()), zeros(Count() / group);
      std::vector<half> scales(zeros.size());
      for (auto& value : q) value = static_cast<uint8_t>(random() % 16);
      for (auto& value : zeros) value = static_cast<uint8_t>(random() % 16);
      for (auto& value : scales) {
        value = __float2half(0.001f + 0.00001f * static_cast<float>(random() % 1000));
      }
      q_.Set(q);
      zeros_.Set(zeros);
      scales_.Set(scales);
    }
    CUDA_OK(PackW4({.q = q_.get(),
                    .zeros = zeros_.get(),
                    .scales = scales_.get(),
                    .dense = dense_.get(),
                    .rows = rows,
                    .columns = columns,
                    .group = group,
                    .pair_rows = pair_rows,
                    .slabs = slabs_.get()},
                   nullptr));
  }

  [[nodiscard]] const uint8_t* slabs() const { return slabs_.get(); }

  // [tokens][rows], rows in logical order.
  [[nodiscard]] std::vector<double> Product(const Real16* x, int tokens) const {
    DeviceArray<double> y(static_cast<size_t>(tokens) * rows_);
    ReferenceKernel<<<dim3((rows_ + 127) / 128, tokens), 128>>>(
        q_.get(), zeros_.get(), scales_.get(), dense_.get(), x, rows_, columns_, group_, Tested(),
        y.get());
    CUDA_OK(cudaDeviceSynchronize());
    return y.Get();
  }

 private:
  [[nodiscard]] size_t Count() const { return static_cast<size_t>(rows_) * columns_; }

  const int rows_, columns_, group_;
  DeviceArray<uint8_t> q_, zeros_;
  DeviceArray<half> scales_;
  DeviceArray<Real16> dense_;
  DeviceArray<uint8_t> slabs_;
};

}  // namespace nibble::cuda
