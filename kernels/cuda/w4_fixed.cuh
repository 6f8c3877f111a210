// Products of a slab with activations in fixed point (kernels/layout/gpu_x.h) on the tensor cores:
// nibbles become bytes by one mask each, and sums are exact. Less than half of the instructions of
// fp16: two for each eight weights, and some for every result of a slab.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/wgmma.cuh"
#include "kernels/layout/gpu_w4.h"

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

}  // namespace nibble::cuda::NIBBLE_ELEMENT
