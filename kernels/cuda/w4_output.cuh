// What becomes of a finished row tile of a batch product, as the tensor cores leave it: in each
// eight tokens a lane holds rows r = lane / 4 and r + 8 of tokens 2 (lane % 4) and the next.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/silu.cuh"
#include "kernels/cuda/w4_batch.h"
#include "kernels/layout/gpu_x.h"

namespace nibble::cuda {

// A lane's place in what it stores.
struct OutputTile {
  int32_t row_tile;
  int32_t first_token;
  int32_t lane;
};

// Where kSiluMul leaves the next product's input (kernels/layout/gpu_x.h) in the place of y_half.
struct OrderedOutput {
  half* x;  // or nullptr
  int32_t group;
  int32_t ordered_tokens;
};

__device__ __forceinline__ float Bias(const W4BatchParams& p, int32_t row) {
  return p.bias == nullptr || row >= p.rows ? 0.0f : __half2float(p.bias[row]);
}

// Rows of lanes, tokens in a lane -> tokens of lanes, rows in a lane: 8 x 8.
__device__ __forceinline__ uint32_t Transposed(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}
__device__ __forceinline__ uint32_t Transposed(float first, float second) {
  return Transposed(Halves(first, second));
}

// Onto four floats side by side, without waiting for what they are.
__device__ __forceinline__ void AddFour(float* to, const float4& four) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(four.x),
               "f"(four.y), "f"(four.z), "f"(four.w)
               : "memory");
}

// Columns `column` and the next of a row of `columns`.
__device__ __forceinline__ void StorePair(half* row, int32_t column, int32_t columns,
                                          uint32_t pair) {
  if (columns % 2 == 0) {
    if (column < columns) *reinterpret_cast<uint32_t*>(row + column) = pair;
    return;
  }
  if (column < columns) row[column] = __ushort_as_half(static_cast<uint16_t>(pair));
  if (column + 1 < columns) row[column + 1] = __ushort_as_half(static_cast<uint16_t>(pair >> 16));
}

template <int32_t kValues>
__device__ __forceinline__ void StoreHalves(const W4BatchParams& p, const OrderedOutput& next,
                                            const OutputTile& at, const float (&acc)[kValues]) {
  const bool silu = p.output == DecodeOutput::kSiluMul;
  const int32_t columns = silu ? p.rows / 2 : p.rows;
  const int32_t column = at.row_tile * (silu ? 8 : layout::kGpuTileRows) + at.lane % 4 * 2;
  const int32_t row = at.row_tile * layout::kGpuTileRows + at.lane / 4;
  const float bias_low = Bias(p, row), bias_high = Bias(p, row + 8);
  const int32_t token = at.first_token + at.lane / 4;
  const bool ordered = silu && next.x != nullptr;
  half* to = p.y_half + static_cast<int64_t>(token) * columns;
  if (ordered) {
    to = next.x + layout::GpuOrderedIndex(token, column, next.group == 0 ? 128 : next.group,
                                          next.ordered_tokens);
  }
#pragma unroll
  for (int32_t t = 0; t < kValues / 4; ++t) {
    if (at.first_token + t * 8 >= p.tokens) break;
    const bool exists = token + t * 8 < p.tokens;
    const float* v = acc + t * 4;
    const float low[2] = {v[0] + bias_low, v[1] + bias_low};
    const float high[2] = {v[2] + bias_high, v[3] + bias_high};
    if (silu) {
      const uint32_t pair = Transposed(SiluTimes(low[0], high[0]), SiluTimes(low[1], high[1]));
      if (exists && ordered) *reinterpret_cast<uint32_t*>(to) = pair;
      if (exists && !ordered) StorePair(to, column, columns, pair);
    } else {
      const uint32_t upper = Transposed(low[0], low[1]), lower = Transposed(high[0], high[1]);
      if (exists) StorePair(to, column, columns, upper);
      if (exists) StorePair(to, column + 8, columns, lower);
    }
    to += 8 * (ordered ? int64_t{64} : columns);
  }
}

// Into y_float, or onto what residual_out holds: old values of 32 tokens are asked for together.
template <int32_t kValues>
__device__ __forceinline__ void StoreFloats(const W4BatchParams& p, const OutputTile& at,
                                            const float (&acc)[kValues]) {
  constexpr int32_t kTogether = kValues < 16 ? kValues : 16;
  const bool add = p.output == DecodeOutput::kAddResidual;
  const int32_t row = at.row_tile * layout::kGpuTileRows + at.lane / 4;
  const float bias[2] = {Bias(p, row), Bias(p, row + 8)};
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
            old[i] + acc[first + i] + bias[i / 2 % 2];
      }
    }
    to += int64_t{32} * p.rows;
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

}  // namespace nibble::cuda
