// PTX instructions that only attention needs, one small function each. Products of a warpgroup are
// asynchronous as wgmma.cuh says.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {

// A warp's 8x8 matrix, transposed in registers: a product's results become the next one's input.
__device__ __forceinline__ uint32_t Transpose(uint32_t matrix) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}
// 2^x, denormals to zero; exp2f spends instructions on them.
__device__ __forceinline__ float Exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// What an earlier kernel wrote, or what may not be there at all: stays behind the waits and the
// questions before it. (__ldcg does not: the compiler may make it early, and has.)
template <typename T>
__device__ __forceinline__ T LoadInOrder(const T* global) {
  T value;
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    asm volatile("ld.global.cg.b16 %0, [%1];" : "=h"(bits) : "l"(global) : "memory");
    memcpy(&value, &bits, sizeof(value));
  } else if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(bits) : "l"(global) : "memory");
    memcpy(&value, &bits, sizeof(value));
  } else if constexpr (sizeof(T) == 8) {
    uint64_t bits;
    asm volatile("ld.global.cg.b64 %0, [%1];" : "=l"(bits) : "l"(global) : "memory");
    memcpy(&value, &bits, sizeof(value));
  } else {
    static_assert(sizeof(T) == sizeof(uint4));
    uint32_t bits[4];
    asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
                 : "l"(global)
                 : "memory");
    memcpy(&value, bits, sizeof(value));
  }
  return value;
}

// A barrier of some of a block's warps; 0 is __syncthreads.
__device__ __forceinline__ void NamedBarrier(int32_t name, int32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// A matrix in shared memory in swizzled rows of 128 bytes, eight rows 1024 bytes. Where the product
// runs along the rows, `rows_apart` is what separates a group of eight rows from the next; where it
// runs across them (k is the row), it is that too, and `panels_apart` separates panels of 64.
__device__ __forceinline__ uint64_t MatrixOf(uint32_t address, int32_t rows_apart,
                                             int32_t panels_apart) {
  constexpr uint64_t kSwizzle128 = 1;
  return static_cast<uint64_t>((address & 0x3ffffu) >> 4) |
         static_cast<uint64_t>(panels_apart >> 4) << 16 |
         static_cast<uint64_t>(rows_apart >> 4) << 32 | kSwizzle128 << 62;
}

#define NIBBLE_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define NIBBLE_D32(i) NIBBLE_D8(i), NIBBLE_D8(i + 8), NIBBLE_D8(i + 16), NIBBLE_D8(i + 24)

// d[64, 128] (+)= a[64, 16] b[128, 16]^T, both in shared memory, rows along k.
__device__ __forceinline__ void GroupScores(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." NIBBLE_ELEMENT_TEXT "." NIBBLE_ELEMENT_TEXT
      " "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
      "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,"
      "%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
      "%64, %65, add, 1, 1, 0, 0;\n}"
      : NIBBLE_D32(0), NIBBLE_D32(32)
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(add)));
}

#undef NIBBLE_D8
#undef NIBBLE_D32

}  // namespace nibble::cuda::NIBBLE_ELEMENT
