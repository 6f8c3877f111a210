// SiLU at a product's end, by the approximate exponential and reciprocal that its fp16 result
// allows.
#pragma once

namespace nibble::cuda {

// The exponential of a number above 88 becomes infinite, and the result zero, as it must.
__device__ __forceinline__ float SiluTimes(float gate, float up) {
  float exponential, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(gate * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + exponential));
  return gate * inverse * up;
}

}  // namespace nibble::cuda
