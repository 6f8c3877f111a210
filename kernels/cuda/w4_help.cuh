// Blocks without tiles of their own help those that have some: of every tile of a batch product
// they take some chunks along k, and leave its sums in the L2, where the tile's block adds them to
// its own. A word says by itself that it has come: between launches all bits of all words are set,
// which is a NaN that no sum is.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {

// What a helper leaves of a tile, a thread's sums four by four, and what the tile's block adds.
template <int32_t kTokens, int32_t kThreads>
struct Help {
  static constexpr int32_t kQuads = kTokens / 8;
  uint4* words;

  __device__ __forceinline__ Help(float* help, int32_t tile, int32_t thread)
      : words(reinterpret_cast<uint4*>(help) + static_cast<int64_t>(tile) * kQuads * kThreads +
              thread) {}
  __device__ __forceinline__ void Leave(const float (&acc)[kTokens / 2]) const {
#pragma unroll
    for (int32_t quad = 0; quad < kQuads; ++quad) {
      const float* v = acc + quad * 4;
      asm volatile(
          "st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(words + quad * kThreads),
          "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
          : "memory");
    }
  }
  __device__ __forceinline__ void Add(float (&acc)[kTokens / 2]) const {
    uint4 values[kQuads];
    for (bool all = false; !all;) {
      all = true;
#pragma unroll
      for (int32_t quad = 0; quad < kQuads; ++quad) {
        values[quad] = LoadRelaxed(words + quad * kThreads);
      }
#pragma unroll
      for (const uint4& value : values) all = all && HaveCome(value);
    }
#pragma unroll
    for (int32_t quad = 0; quad < kQuads; ++quad) {
      words[quad * kThreads] = FourNotCome();
      acc[quad * 4] += __uint_as_float(values[quad].x);
      acc[quad * 4 + 1] += __uint_as_float(values[quad].y);
      acc[quad * 4 + 2] += __uint_as_float(values[quad].z);
      acc[quad * 4 + 3] += __uint_as_float(values[quad].w);
    }
  }
};

}  // namespace nibble::cuda::NIBBLE_ELEMENT
