// Nibbles of a slab (kernels/layout/gpu_w4.h) as fragments of the element type, in three ways:
// (q - zero) * scale rounded once; q - zero, exact, its scale left to fp32 sums; and q with a bias,
// exact, the bias and the scale left to fp32 sums.
//
// A nibble becomes a number by two bits operations: it is put behind the exponent of a power of two
// whose last place is one. fp16's 1024 leaves ten bits, so a nibble at bit 4 is 16 q there: rows
// r + 8 come without a shift. bf16's 128 leaves seven: every nibble is shifted to bit 0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda {

__device__ __forceinline__ uint32_t Word(const uint4& four, int32_t index) {
  return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
}

namespace f16 {

__device__ __forceinline__ half2 AsHalf2(uint32_t bits) {
  return *reinterpret_cast<const half2*>(&bits);
}
__device__ __forceinline__ uint32_t AsBits(half2 pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
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

// (q - zero) * scale, rounded once.
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

// Without scales: q - zero in rows r, 16 (q - zero) in rows r + 8.
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

// Biased: 1024 + q in rows r. 1024 + 16 q in rows r + 8, or with `kBytes` 1024 + 16 q + the q of
// row r, which is an instruction less for eight weights and one more for every result.
constexpr bool kBytesWiden = true;
template <bool kBytes>
__device__ __forceinline__ void WidenBiased(uint32_t w, uint32_t (&a)[4]) {
  constexpr uint32_t kBias = 0x64006400u;
  if constexpr (kBytes) {
    a[1] = AndOr<0x00ff00ff>(w, kBias);
    a[3] = __byte_perm(w, kBias, 0x7371);
    a[0] = a[1] & 0xff0fff0fu;
    a[2] = a[3] & 0xff0fff0fu;
  } else {
    a[0] = AndOr<0x000f000f>(w, kBias);
    a[1] = AndOr<0x00f000f0>(w, kBias);
    a[2] = AndOr<0x000f000f>(w >> 8, kBias);
    a[3] = AndOr<0x00f000f0>(w >> 8, kBias);
  }
}
// What sums of rows r + 8 are multiplied by besides.
constexpr float kBiasedHigh = 0.0625f;
// What widening and zeros, a byte each, add to row r, to row r + 8.
template <bool kBytes>
__device__ __forceinline__ float2 Biases(uint32_t zeros) {
  const uint32_t biased = __byte_perm(zeros, 0x64646464u, 0x4140);  // 1024 + z
  return __half22float2(__hfma2(AsHalf2(biased), __floats2half2_rn(1, 16),
                                __floats2half2_rn(0, kBytes ? -16384 : -15360)));
}

}  // namespace f16

namespace bf16 {

constexpr uint32_t kBias = 0x43004300u;  // 128, 128

__device__ __forceinline__ __nv_bfloat162 AsPair(uint32_t bits) {
  return *reinterpret_cast<const __nv_bfloat162*>(&bits);
}
__device__ __forceinline__ uint32_t AsBits(__nv_bfloat162 pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Biased: 128 + q. 7 instructions for 8 weights; two nibbles together find no place.
constexpr bool kBytesWiden = false;
template <bool kBytes>
__device__ __forceinline__ void WidenBiased(uint32_t w, uint32_t (&a)[4]) {
  a[0] = AndOr<0x000f000f>(w, kBias);
  a[1] = AndOr<0x000f000f>(w >> 4, kBias);
  a[2] = AndOr<0x000f000f>(w >> 8, kBias);
  a[3] = AndOr<0x000f000f>(w >> 12, kBias);
}
constexpr float kBiasedHigh = 1;
// Of both zeros, a byte each: 128 + z.
template <bool kBytes>
__device__ __forceinline__ float2 Biases(uint32_t zeros) {
  return make_float2(__uint_as_float(0x43000000u | (zeros & 0xffu) << 16),
                     __uint_as_float(0x43000000u | (zeros & 0xff00u) << 8));
}

// Without scales: q - zero.
struct GroupZeros {
  __nv_bfloat162 low, high;  // 128 + z of rows r, r + 8
};
__device__ __forceinline__ GroupZeros MakeZeros(uint16_t zeros) {
  const uint32_t low = zeros & 0xffu, high = zeros >> 8;
  return {AsPair(kBias | low | low << 16), AsPair(kBias | high | high << 16)};
}
__device__ __forceinline__ void WidenUnscaled(uint32_t w, const GroupZeros& zeros,
                                              uint32_t (&a)[4]) {
  WidenBiased<false>(w, a);
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    a[i] = AsBits(__hsub2(AsPair(a[i]), i % 2 == 0 ? zeros.low : zeros.high));
  }
}
__device__ __forceinline__ float2 UnscaledFactors(half2 scales) { return __half22float2(scales); }

// A scale of fp16 is the sum of two bf16 numbers, and what the second one adds to a weight is
// exact.
struct ScalePair {
  __nv_bfloat162 most, rest;
};
__device__ __forceinline__ ScalePair MakeScale(float scale) {
  const __nv_bfloat16 most = __float2bfloat16(scale);
  return {__bfloat162bfloat162(most),
          __bfloat162bfloat162(__float2bfloat16(scale - __bfloat162float(most)))};
}
struct GroupConstants {
  ScalePair low, high;  // of rows r, r + 8
  GroupZeros zeros;
};
__device__ __forceinline__ GroupConstants MakeConstants(half2 scales, uint16_t zeros) {
  return {MakeScale(__low2float(scales)), MakeScale(__high2float(scales)), MakeZeros(zeros)};
}

// (q - zero) * scale, rounded once.
__device__ __forceinline__ void Widen(uint32_t w, const GroupConstants& c, uint32_t (&a)[4]) {
  WidenUnscaled(w, c.zeros, a);
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    const ScalePair& scale = i % 2 == 0 ? c.low : c.high;
    a[i] = AsBits(__hfma2(AsPair(a[i]), scale.most, __hmul2(AsPair(a[i]), scale.rest)));
  }
}

}  // namespace bf16
}  // namespace nibble::cuda
