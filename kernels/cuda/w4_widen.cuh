// Nibbles of a slab (kernels/layout/gpu_w4.h) as fragments of fp16: (q - zero) * scale, rounded
// once.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda {

__device__ __forceinline__ half2 AsHalf2(uint32_t bits) {
  return *reinterpret_cast<const half2*>(&bits);
}
__device__ __forceinline__ uint32_t AsBits(half2 pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t Word(const uint4& four, int32_t index) {
  return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
}

// Of one group, for rows r and r + 8.
struct GroupConstants {
  half2 scale_low, scale_high;
  half2 bias_low, bias_high;  // 1024 + z; -(64 + z)
};
__device__ __forceinline__ GroupConstants MakeConstants(half2 scales, uint16_t zeros) {
  const uint32_t low = 0x6400u + (zeros & 0xffu);               // 1024 + z
  const uint32_t high = 0xd400u + ((zeros >> 8 & 0xffu) << 4);  // -(64 + z)
  return {__low2half2(scales), __high2half2(scales), AsHalf2(low | low << 16),
          AsHalf2(high | high << 16)};
}

__device__ __forceinline__ void Widen(uint32_t w, const GroupConstants& c, uint32_t (&a)[4]) {
  constexpr uint32_t kBias = 0x64006400u;
  const half2 sixteenth = AsHalf2(0x2c002c00u);
  const half2 low0 = AsHalf2(AndOr<0x000f000f>(w, kBias));
  const half2 high0 = AsHalf2(AndOr<0x00f000f0>(w, kBias));
  const half2 low1 = AsHalf2(AndOr<0x000f000f>(w >> 8, kBias));
  const half2 high1 = AsHalf2(AndOr<0x00f000f0>(w >> 8, kBias));
  a[0] = AsBits(__hmul2(__hsub2(low0, c.bias_low), c.scale_low));
  a[1] = AsBits(__hmul2(__hfma2(high0, sixteenth, c.bias_high), c.scale_high));
  a[2] = AsBits(__hmul2(__hsub2(low1, c.bias_low), c.scale_low));
  a[3] = AsBits(__hmul2(__hfma2(high1, sixteenth, c.bias_high), c.scale_high));
}

// The same without scales: q - zero in rows r, 16 (q - zero) in rows r + 8. Exact.
struct GroupZeros {
  half2 low, high;  // 1024 + z; 1024 + 16 z
};
__device__ __forceinline__ GroupZeros MakeZeros(uint16_t zeros) {
  const uint32_t low = 0x6400u | (zeros & 0xffu);
  const uint32_t high = 0x6400u | (zeros >> 4 & 0xff0u);
  return {AsHalf2(low | low << 16), AsHalf2(high | high << 16)};
}
__device__ __forceinline__ void WidenUnscaled(uint32_t w, const GroupZeros& zeros,
                                              uint32_t (&a)[4]) {
  constexpr uint32_t kBias = 0x64006400u;
  a[0] = AsBits(__hsub2(AsHalf2(AndOr<0x000f000f>(w, kBias)), zeros.low));
  a[1] = AsBits(__hsub2(AsHalf2(AndOr<0x00f000f0>(w, kBias)), zeros.high));
  a[2] = AsBits(__hsub2(AsHalf2(AndOr<0x000f000f>(w >> 8, kBias)), zeros.low));
  a[3] = AsBits(__hsub2(AsHalf2(AndOr<0x00f000f0>(w >> 8, kBias)), zeros.high));
}
// What sums of rows r and r + 8 are multiplied by.
__device__ __forceinline__ float2 UnscaledFactors(half2 scales) {
  return make_float2(__low2float(scales), __high2float(scales) * 0.0625f);
}

}  // namespace nibble::cuda
