// Blocks that share a tile of a batch product along k meet in the L2: each leaves its part of the
// sums there, takes its share of the tile's (token, slab of rows) pairs, adds up their parts, and
// leaves what the next norm's product takes in. A word says by itself that it has come: between
// launches all bits of all words are set, which is a NaN that no sum is.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/w4_fixed.cuh"
#include "kernels/cuda/w4_wgmma.h"
#include "kernels/layout/gpu_x.h"

namespace nibble::cuda::NIBBLE_ELEMENT {

// What a lane has of a pair: four columns of the slab.
struct MeetingPair {
  float4 x;  // the residual stream
  uint2 weights;
  float scale;

  // What does not wait for other blocks, and is not waited for here either.
  __device__ __forceinline__ void Load(const W4BatchParams& p, const NextInput& next, int32_t token,
                                       int32_t slab, int32_t lane) {
    const int32_t column = slab * layout::kGpuSlabColumns + lane * 4;
    x = make_float4(0, 0, 0, 0);
    weights = make_uint2(0, 0);
    if (column < p.rows) {
      x = *reinterpret_cast<const float4*>(p.residual_out + static_cast<int64_t>(token) * p.rows +
                                           column);
      weights = *reinterpret_cast<const uint2*>(next.norm_weight + column);
    }
    scale = next.scale[token];
  }
  // Adds parts in their order as they come, and leaves their words as they were.
  __device__ __forceinline__ void Add(float* words, int64_t part_stride, int32_t parts) {
    const auto place = [&](int32_t part) {
      return reinterpret_cast<uint4*>(words + part * part_stride);
    };
    uint4 values[kWgmmaPartsMax];
#pragma unroll
    for (int32_t part = 0; part < kWgmmaPartsMax; ++part) {
      if (part < parts) values[part] = LoadRelaxed(place(part));
    }
    // All that are missing are asked for together.
    for (bool all = false; !all;) {
      all = true;
#pragma unroll
      for (int32_t part = 0; part < kWgmmaPartsMax; ++part) {
        if (part >= parts || HaveCome(values[part])) continue;
        values[part] = LoadRelaxed(place(part));
        all = false;
      }
    }
#pragma unroll
    for (int32_t part = 0; part < kWgmmaPartsMax; ++part) {
      if (part >= parts) break;
      *place(part) = FourNotCome();
      x.x += __uint_as_float(values[part].x);
      x.y += __uint_as_float(values[part].y);
      x.z += __uint_as_float(values[part].z);
      x.w += __uint_as_float(values[part].w);
    }
  }
  // Of the next product's input.
  __device__ __forceinline__ void Weighted(float (&v)[4]) {
    asm volatile("" : "+f"(scale), "+r"(weights.x), "+r"(weights.y));  // not used earlier
    const auto* weight = reinterpret_cast<const Real16*>(&weights);
    const float factor = scale * kNormedInputFactor;
    v[0] = x.x * ToFloat(weight[0]) * factor;
    v[1] = x.y * ToFloat(weight[1]) * factor;
    v[2] = x.z * ToFloat(weight[2]) * factor;
    v[3] = x.w * ToFloat(weight[3]) * factor;
  }
};

// One (token, slab) pair, by a warp that has loaded it.
__device__ __forceinline__ void FinishPair(const W4BatchParams& p, const WgmmaInput& input,
                                           int32_t token, int32_t slab, int32_t parts,
                                           int32_t ordered_tokens, int32_t lane,
                                           MeetingPair* loaded) {
  MeetingPair& pair = *loaded;
  const int32_t rows = p.rows;
  const int32_t column = slab * layout::kGpuSlabColumns + lane * 4;
  const NextInput& next = input.next;
  const int64_t at = static_cast<int64_t>(token) * rows + column;
  if (column < rows) {
    pair.Add(input.meeting + at, static_cast<int64_t>(p.tokens) * rows, parts);
    *reinterpret_cast<float4*>(p.residual_out + at) = pair.x;
  }
  float v[4];
  pair.Weighted(v);
  if (input.next_scales != nullptr) {
    StoreFixed(v, token, column, ordered_tokens, next.x, input.next_scales);
  } else {
    const int32_t group = input.next_group == 0 ? 128 : input.next_group;
#pragma unroll
    for (int32_t i = 0; i < 4; i += 2) {
      const int64_t to = layout::GpuOrderedIndex(token, column + i, group, ordered_tokens);
      *reinterpret_cast<uint32_t*>(next.x + to) = RealBits(v[i], v[i + 1]);
    }
  }
  const float squares = SumOfWarp(pair.x.x * pair.x.x + pair.x.y * pair.x.y + pair.x.z * pair.x.z +
                                  pair.x.w * pair.x.w);
  if (lane == 0) next.square_sums[token * layout::GpuSlabs(rows) + slab] = squares;
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
