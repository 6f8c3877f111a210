// What differs between element types: conversions, products, ones. A source whose kernels depend on
// the element type is compiled once for each, with NIBBLE_ELEMENT f16 or bf16; all that it defines
// stands in the namespace of that name, where it finds these functions. Callers outside go through
// by_element.cc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/element.h"

#ifndef NIBBLE_ELEMENT
#error "compiled by nibble_cuda_objects(... BY_ELEMENT ...)"
#endif
#define NIBBLE_TEXT_OF(name) #name
#define NIBBLE_TEXT(name) NIBBLE_TEXT_OF(name)
// In instructions' names.
#define NIBBLE_ELEMENT_TEXT NIBBLE_TEXT(NIBBLE_ELEMENT)

namespace nibble::cuda {

// Two numbers side by side, the lower one first; a register of a fragment.
struct alignas(4) Real16x2 {
  uint32_t bits;
};

namespace f16 {

constexpr Element kElement = Element::kHalf;
constexpr uint32_t kOnes = 0x3c003c00u;  // 1, 1

__device__ __forceinline__ float ToFloat(Real16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
__device__ __forceinline__ Real16 ToReal(float x) { return {__half_as_ushort(__float2half(x))}; }
__device__ __forceinline__ float2 ToFloats(Real16x2 pair) {
  return __half22float2(*reinterpret_cast<const half2*>(&pair));
}
__device__ __forceinline__ Real16x2 ToReals(float low, float high) {
  const half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const Real16x2*>(&pair);
}
// Of memory that no kernel writes.
__device__ __forceinline__ Real16x2 LoadConstant(const Real16x2* pair) {
  const half2 loaded = __ldg(reinterpret_cast<const half2*>(pair));
  return *reinterpret_cast<const Real16x2*>(&loaded);
}

}  // namespace f16

namespace bf16 {

constexpr Element kElement = Element::kBfloat16;
constexpr uint32_t kOnes = 0x3f803f80u;

__device__ __forceinline__ float ToFloat(Real16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ Real16 ToReal(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16(x))};
}
__device__ __forceinline__ float2 ToFloats(Real16x2 pair) {
  return make_float2(__uint_as_float(pair.bits << 16), __uint_as_float(pair.bits & 0xffff0000u));
}
__device__ __forceinline__ Real16x2 ToReals(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const Real16x2*>(&pair);
}
__device__ __forceinline__ Real16x2 LoadConstant(const Real16x2* pair) {
  return {__ldg(reinterpret_cast<const uint32_t*>(pair))};
}

}  // namespace bf16

namespace NIBBLE_ELEMENT {

// Two numbers as a register of a fragment.
__device__ __forceinline__ uint32_t RealBits(float low, float high) {
  return ToReals(low, high).bits;
}

// d += a * b on the tensor cores: a 16x16, b 16x8, d 16x8 in fp32.
__device__ __forceinline__ void Mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." NIBBLE_ELEMENT_TEXT "." NIBBLE_ELEMENT_TEXT
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace NIBBLE_ELEMENT
}  // namespace nibble::cuda
