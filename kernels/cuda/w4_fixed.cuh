// Activations in fixed point (kernels/layout/gpu_x.h): how a slab of them is left, and products of
// a slab with them on the tensor cores: nibbles become bytes by one mask each, and sums are exact.
// Less than half of the instructions of fp16: two for each eight weights, and some for every result
// of a slab.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/layout/gpu_w4.h"
#include "kernels/layout/gpu_x.h"

namespace nibble::cuda::NIBBLE_ELEMENT {

// A warp's 16 rows of a slab of one group.
template <int32_t kTokens>
struct FixedSlab {
  int32_t acc[kTokens];  // of each two: the high byte's sums and the low byte's
  uint32_t a[4][4];
  half2 scales;
  uint16_t zeros;

  // Nibbles of rows r + 8 stay where they are: 16 times what they are.
  __device__ __forceinline__ void Multiply(const uint8_t* slab, uint64_t b, int32_t lane) {
    const uint8_t* constants = slab + layout::kGpuSlabNibbleBytes;
    scales = *reinterpret_cast<const half2*>(constants + lane / 4 * 4);
    zeros = *reinterpret_cast<const uint16_t*>(constants + 32 + lane / 4 * 2);
#pragma unroll
    for (int32_t part = 0; part < 2; ++part) {
      const uint4 four = LoadShared128(slab + part * 512 + lane * 16);
      const uint32_t words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        a[part * 2 + i / 2][i % 2 * 2] = words[i] & 0x0f0f0f0fu;
        a[part * 2 + i / 2][i % 2 * 2 + 1] = words[i] & 0xf0f0f0f0u;
      }
    }
    WarpgroupFence();
    WarpgroupMmaBytes<2 * kTokens>::template Add<true>(acc, a[0], b);
#pragma unroll
    for (int32_t i = 1; i < 4; ++i) {
      WarpgroupMmaBytes<2 * kTokens>::template Add<false>(acc, a[i], Further(b, i * 32));
    }
    WarpgroupCommit();
  }

  // Adds what the products have left, less the zeros, by all scales. `sum` as the tensor cores
  // leave fp16 products. `of_tokens`: the slab's scales and sums.
  __device__ __forceinline__ void AddTo(const float* of_tokens, int32_t lane,
                                        float (&sum)[kTokens / 2]) {
    PinRegisters(acc);
    const float2 scale = make_float2(__low2float(scales), __high2float(scales) * 0.0625f);
    const float2 zero =
        make_float2(static_cast<float>(zeros & 0xffu), static_cast<float>(zeros >> 4 & 0xff0u));
    const float* from = of_tokens + lane % 4 * (kTokens / 4);
#pragma unroll
    for (int32_t two = 0; two < kTokens / 8; ++two) {
      const float2 x = *reinterpret_cast<const float2*>(from + two * 2);
      const float2 x_sum = *reinterpret_cast<const float2*>(from + kTokens + two * 2);
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        // Of token i % 2 of the two, rows r and r + 8.
        const int32_t* bytes = acc + two * 8 + i % 2 * 4 + i / 2 * 2;
        const auto number = static_cast<float>(bytes[0] * 256 + bytes[1]);
        const float of_x = i % 2 == 0 ? x.x : x.y, of_sum = i % 2 == 0 ? x_sum.x : x_sum.y;
        const float product = number * of_x - (i < 2 ? zero.x : zero.y) * of_sum;
        sum[two * 4 + i] += product * (i < 2 ? scale.x : scale.y);
      }
    }
  }
};

// A warp's slab of a token in fixed point; a lane has four k.
__device__ __forceinline__ void StoreFixed(const float (&v)[4], int32_t token, int32_t column,
                                           int32_t ordered_tokens, Real16* x, float* scales) {
  // Magnitudes lie as their bits do, and no number behind them.
  uint32_t most = 0;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
  const float largest = __uint_as_float(__reduce_max_sync(0xffffffffu, most));
  const float inverse =
      largest > 0 ? __fdividef(static_cast<float>(layout::kGpuFixedMax), largest) : 0;
  int32_t number[4], sum = 0;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    number[i] = __float2int_rn(v[i] * inverse);
    sum += number[i];
  }
  sum = __reduce_add_sync(0xffffffffu, sum);
  uint32_t high = 0, low = 0;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    const int32_t shift = (i == 1 ? 2 : i == 2 ? 1 : i) * 8;
    high |= (static_cast<uint32_t>((number[i] + 128) >> 8) & 0xffu) << shift;
    low |= (static_cast<uint32_t>(number[i]) & 0xffu) << shift;
  }
  auto* bytes = reinterpret_cast<uint8_t*>(x);
  *reinterpret_cast<uint32_t*>(bytes + layout::GpuFixedIndex(token, column, true, ordered_tokens)) =
      high;
  *reinterpret_cast<uint32_t*>(bytes +
                               layout::GpuFixedIndex(token, column, false, ordered_tokens)) = low;
  if (column % layout::kGpuSlabColumns != 0) return;
  const int32_t slab = column / layout::kGpuSlabColumns;
  const float scale = largest / static_cast<float>(layout::kGpuFixedMax);
  scales[layout::GpuFixedScaleIndex(token, slab, false, ordered_tokens)] = scale;
  scales[layout::GpuFixedScaleIndex(token, slab, true, ordered_tokens)] =
      scale * static_cast<float>(sum);
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
