// What becomes of a finished row tile of a batch product, as the tensor cores leave it: in each
// eight tokens a lane holds rows r = lane / 4 and r + 8 of tokens 2 (lane % 4) and the next.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/silu.cuh"
#include "kernels/cuda/w4_batch.h"
#include "kernels/layout/gpu_x.h"

namespace nibble::cuda::NIBBLE_ELEMENT {

// A lane's place in what it stores.
struct OutputTile {
  int32_t row_tile;
  int32_t first_token;
  int32_t lane;
};

// Where kSiluMul leaves the next product's input (kernels/layout/gpu_x.h) in the place of y_half.
struct OrderedOutput {
  Real16* x;  // or nullptr
  int32_t group;
  int32_t ordered_tokens;
};

// Of rows r and r + 8.
__device__ __forceinline__ float2 RowBiases(const W4BatchParams& p, int32_t row) {
  if (p.bias == nullptr) return make_float2(0, 0);
  return make_float2(row < p.rows ? ToFloat(p.bias[row]) : 0,
                     row + 8 < p.rows ? ToFloat(p.bias[row + 8]) : 0);
}

// Rows of lanes, tokens in a lane -> tokens of lanes, rows in a lane: 8 x 8.
__device__ __forceinline__ uint32_t Transposed(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Onto four floats side by side, without waiting for what they are.
__device__ __forceinline__ void AddFour(float* to, const float4& four) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(four.x),
               "f"(four.y), "f"(four.z), "f"(four.w)
               : "memory");
}

// Columns `column` and the next of a row of `columns`.
__device__ __forceinline__ void StorePair(Real16* row, int32_t column, int32_t columns,
                                          uint32_t pair) {
  if (columns % 2 == 0) {
    if (column < columns) *reinterpret_cast<uint32_t*>(row + column) = pair;
    return;
  }
  if (column < columns) row[column] = Real16{static_cast<uint16_t>(pair)};
  if (column + 1 < columns) row[column + 1] = Real16{static_cast<uint16_t>(pair >> 16)};
}

template <int32_t kValues>
__device__ __forceinline__ void StoreHalves(const W4BatchParams& p, const OrderedOutput& next,
                                            const OutputTile& at, const float (&acc)[kValues]) {
  const bool silu = p.output == DecodeOutput::kSiluMul;
  const int32_t columns = silu ? p.rows / 2 : p.rows;
  const int32_t column = at.row_tile * (silu ? 8 : layout::kGpuTileRows) + at.lane % 4 * 2;
  const int32_t row = at.row_tile * layout::kGpuTileRows + at.lane / 4;
  const float2 bias = RowBiases(p, row);
  const int32_t token = at.first_token + at.lane / 4;
  const bool ordered = silu && next.x != nullptr;
  const int64_t stride = ordered ? 64 : columns;
  Real16* to = p.y_half + static_cast<int64_t>(token) * columns;
  if (ordered) {
    to = next.x + layout::GpuOrderedIndex(token, column, next.group == 0 ? 128 : next.group,
                                          next.ordered_tokens);
  }
  // Step by step for several eights of tokens: their latencies overlap.
  constexpr int32_t kEights = kValues / 4;
  constexpr int32_t kTogether = kEights < 8 ? kEights : kEights % 8 == 0 ? 8 : 6;
  static_assert(kEights % kTogether == 0);  // else it stores what no sum is
#pragma unroll
  for (int32_t first = 0; first < kEights; first += kTogether) {
    uint32_t pairs[kTogether], lower[kTogether];
#pragma unroll
    for (int32_t t = 0; t < kTogether; ++t) {
      const float* v = acc + (first + t) * 4;
      const float low[2] = {v[0] + bias.x, v[1] + bias.x};
      const float high[2] = {v[2] + bias.y, v[3] + bias.y};
      pairs[t] = silu ? RealBits(SiluTimes(low[0], high[0]), SiluTimes(low[1], high[1]))
                      : RealBits(low[0], low[1]);
      lower[t] = RealBits(high[0], high[1]);
    }
#pragma unroll
    for (int32_t t = 0; t < kTogether; ++t) {
      pairs[t] = Transposed(pairs[t]);
      if (!silu) lower[t] = Transposed(lower[t]);
    }
#pragma unroll
    for (int32_t t = 0; t < kTogether; ++t, to += 8 * stride) {
      if (token + (first + t) * 8 >= p.tokens) continue;
      if (ordered) {
        *reinterpret_cast<uint32_t*>(to) = pairs[t];
        continue;
      }
      StorePair(to, column, columns, pairs[t]);
      if (!silu) StorePair(to, column + 8, columns, lower[t]);
    }
  }
}

// Into y_float, or onto what residual_out holds: old values of 32 tokens are asked for together.
template <int32_t kValues>
__device__ __forceinline__ void StoreFloats(const W4BatchParams& p, const OutputTile& at,
                                            const float (&acc)[kValues]) {
  constexpr int32_t kTogether = kValues < 16 ? kValues : 16;
  static_assert(kValues % kTogether == 0);
  const bool add = p.output == DecodeOutput::kAddResidual;
  const int32_t row = at.row_tile * layout::kGpuTileRows + at.lane / 4;
  const float2 bias = RowBiases(p, row);
  const int32_t token = at.first_token + at.lane % 4 * 2;
  float* to = (add ? p.residual_out : p.y_float) + static_cast<int64_t>(token) * p.rows + row;
  const bool real[2] = {row < p.rows, row + 8 < p.rows};
#pragma unroll
  for (int32_t first = 0; first < kValues; first += kTogether) {
    if (at.first_token + first * 2 >= p.tokens) break;
    float old[kTogether];
#pragma unroll
    for (int32_t i = 0; i < kTogether; ++i) {
      const int32_t offset = i / 4 * 8 + i % 2;
      const bool exists = add && token + first * 2 + offset < p.tokens && real[i / 2 % 2];
      old[i] = exists ? to[static_cast<int64_t>(offset) * p.rows + i / 2 % 2 * 8] : 0;
    }
#pragma unroll
    for (int32_t i = 0; i < kTogether; ++i) {
      const int32_t offset = i / 4 * 8 + i % 2;
      if (token + first * 2 + offset < p.tokens && real[i / 2 % 2]) {
        to[static_cast<int64_t>(offset) * p.rows + i / 2 % 2 * 8] =
            old[i] + acc[first + i] + (i / 2 % 2 == 0 ? bias.x : bias.y);
      }
    }
    to += int64_t{32} * p.rows;
  }
}

// A block's part of the sums, behind the parts of those before it; biases belong to the first.
// kWatched: other blocks may be waiting for it.
template <bool kWatched, int32_t kValues>
__device__ __forceinline__ void StorePartialSums(const W4BatchParams& p, float* parts, int32_t part,
                                                 const OutputTile& at,
                                                 const float (&acc)[kValues]) {
  const int32_t row = at.row_tile * layout::kGpuTileRows + at.lane / 4;
  const float2 bias = part == 0 ? RowBiases(p, row) : make_float2(0, 0);
  const int32_t token = at.first_token + at.lane % 4 * 2;
  float* to = parts + (static_cast<int64_t>(part) * p.tokens + token) * p.rows + row;
#pragma unroll
  for (int32_t i = 0; i < kValues; ++i) {
    const int32_t offset = i / 4 * 8 + i % 2;
    if (token + offset < p.tokens && row + i / 2 % 2 * 8 < p.rows) {
      float* word = to + static_cast<int64_t>(offset) * p.rows + i / 2 % 2 * 8;
      const float sum = acc[i] + (i / 2 % 2 == 0 ? bias.x : bias.y);
      if constexpr (kWatched) {
        asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(word), "f"(sum) : "memory");
      } else {
        *word = sum;
      }
    }
  }
}

// REQUIRES: a row tile that exists.
template <int32_t kValues>
__device__ __forceinline__ void StoreRowTile(const W4BatchParams& p, const OrderedOutput& next,
                                             const OutputTile& at, const float (&acc)[kValues]) {
  if (p.output == DecodeOutput::kHalf || p.output == DecodeOutput::kSiluMul) {
    StoreHalves(p, next, at, acc);
  } else {
    StoreFloats(p, at, acc);
  }
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
