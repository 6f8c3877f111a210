// A product as a phase of the decode step: what the consumer warps do between two meetings.
//
// Most of a phase's instructions run once, by all warps together, and have left the schedulers'
// caches since the phase before: they cost several times what they cost in a loop, and nothing
// hides them. So what does not change is reckoned beforehand (PhaseShape), one piece of code serves
// every product, and nothing is spilled: the wait for the other blocks empties the L1, and local
// memory comes from the L2 then.
#pragma once

#include "kernels/cuda/attention_ptx.cuh"
#include "kernels/cuda/decode_step_ring.cuh"

namespace nibble::cuda::step {

// Of the consumers alone.
__device__ __forceinline__ void Meet() { NamedBarrier(1, kConsumerThreads); }

// What of a phase is reckoned while the phase before runs.
struct PhaseShape {
  int32_t slabs;
  int32_t chunks;
  int32_t tiles;  // of this block
};

// A phase as it lies in shared memory.
struct alignas(16) Phase {
  StepPhase given;
  PhaseShape shape;
};

constexpr int32_t kTilesAdded = 8;  // of a block, in a product that adds to the residual stream
constexpr int32_t kSquaresMax = 512;
constexpr int32_t kRoundBytes = 16 * 1024;

// Offsets into shared memory.
constexpr int32_t kPhasesAt = kRestAt;  // [2]
constexpr int32_t kPartialsAt = kPhasesAt + 2 * static_cast<int32_t>(sizeof(Phase));
// Of a round, twice: float4 [tile][warp][pair of tokens][row].
constexpr int32_t kOldAt = kPartialsAt + 2 * kRoundBytes;       // float [kTilesAdded][8 tokens][16]
constexpr int32_t kNormAt = kOldAt + kTilesAdded * 8 * 16 * 4;  // half [kTilesAdded][16]
constexpr int32_t kSquaresAt = kNormAt + kTilesAdded * 16 * 2;  // float [8 tokens][kSquaresMax]
constexpr int32_t kGivenAt = kSquaresAt + 8 * kSquaresMax * 4;  // float [2][8]: scales as given
constexpr int32_t kFactorsAt = kGivenAt + 2 * 8 * 4;            // float [8]
constexpr int32_t kScalesAt = kFactorsAt + 8 * 4;               // float [8]
constexpr int32_t kProductEnd = kScalesAt + 8 * 4;

template <typename T>
__device__ __forceinline__ T* At(int32_t offset) {
  return reinterpret_cast<T*>(memory + offset);
}

// Of the step: how many tiles a round has.
struct StepShape {
  int32_t tokens;
  int32_t pair_shift;  // 2^pair_shift pairs of tokens have room
  __device__ __forceinline__ explicit StepShape(int32_t count)
      : tokens(count),
        pair_shift(count <= 2   ? 0
                   : count <= 4 ? 1
                                : 2) {}
  [[nodiscard]] __device__ __forceinline__ int32_t RoundTiles() const { return 8 >> pair_shift; }
};

// Activations of a warp's two slabs, and their sums for the tokens of this lane's results.
struct Activations {
  uint32_t b[kWarpSlabs][8][2];
  float2 sums[kWarpSlabs];
};

// Eight halves where they exist; otherwise `to` keeps what it has.
__device__ __forceinline__ void LoadEight(bool exists, const half* from, uint32_t (&low)[2],
                                          uint32_t (&high)[2]) {
  asm volatile(
      "{\n.reg .pred exists;\nsetp.ne.s32 exists, %5, 0;\n"
      "@exists ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(low[0]), "+r"(low[1]), "+r"(high[0]), "+r"(high[1])
      : "l"(from), "r"(static_cast<int32_t>(exists)));
}
// K-steps [4 * half_slab, 4 * half_slab + 4) of the warp's slabs of the chunk that begins at slab
// `begin`. The address is reckoned each time: it would be in the way of the products.
__device__ __forceinline__ void LoadHalf(const W4DecodeParams& p, int32_t begin, int32_t half_slab,
                                         int32_t warp, int32_t lane, Activations* x) {
  const int32_t column = (begin + FirstSlab(warp)) * layout::kGpuSlabColumns + lane % 4 * 32;
  const int32_t left = lane / 4 < p.tokens ? p.columns - column : 0;
  const half* from = p.x + (lane / 4 * p.columns + column);
#pragma unroll
  for (int32_t s = 0; s < kWarpSlabs; ++s) {
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t ks = 4 * half_slab + 2 * i;
      const int32_t at = s * layout::kGpuSlabColumns + 4 * ks;
      LoadEight(at < left, from + at, x->b[s][ks], x->b[s][ks + 1]);
    }
  }
}
// A product with ones puts every token's sum where the lane needs it.
__device__ __forceinline__ void SumSlabs(Activations* x) {
  const uint32_t ones[4] = {decode::kOnes, decode::kOnes, decode::kOnes, decode::kOnes};
  float sum[kWarpSlabs][4] = {};
#pragma unroll
  for (int32_t ks = 0; ks < 8; ++ks) {
#pragma unroll
    for (int32_t s = 0; s < kWarpSlabs; ++s) MmaF16(sum[s], ones, x->b[s][ks][0], x->b[s][ks][1]);
  }
#pragma unroll
  for (int32_t s = 0; s < kWarpSlabs; ++s) x->sums[s] = make_float2(sum[s][0], sum[s][1]);
}

// acc += W x of two slabs of each of two row tiles; `second`: bytes to the second slab.
template <typename Reload>
__device__ __forceinline__ void MultiplyUnit(int32_t first_tile, int32_t second_tile,
                                             int32_t second, int32_t lane, const Activations& x,
                                             float (&acc)[2][4], const Reload& reload) {
  const int32_t at[4] = {first_tile, first_tile + second, second_tile, second_tile + second};
  float part[4][4] = {};
#pragma unroll
  for (int32_t first = 0; first < 8; first += 2) {
    uint2 words[4];
#pragma unroll
    for (int32_t product = 0; product < 4; ++product) {
      words[product] = *reinterpret_cast<const uint2*>(memory + at[product] + first / 4 * 512 +
                                                       lane * 16 + first % 4 * 4);
    }
#pragma unroll
    for (int32_t step = 0; step < 2; ++step) {
#pragma unroll
      for (int32_t product = 0; product < 4; ++product) {
        uint32_t a[4];
        decode::Widen(step == 0 ? words[product].x : words[product].y, a);
        const uint32_t(&b)[2] = x.b[product % 2][first + step];
        MmaF16(part[product], a, b[0], b[1]);
      }
    }
    if (first % 4 == 2) reload(first / 4);
  }
#pragma unroll
  for (int32_t product = 0; product < 4; ++product) {
    const decode::GroupConstants c = decode::LoadConstants(memory + at[product], 0, lane);
    const float2 sums = x.sums[product % 2];
    float(&to)[4] = acc[product / 2];
    to[0] = fmaf(c.scales.x, fmaf(-c.biases.x, sums.x, part[product][0]), to[0]);
    to[1] = fmaf(c.scales.x, fmaf(-c.biases.x, sums.y, part[product][1]), to[1]);
    to[2] = fmaf(c.scales.y, fmaf(-c.biases.y, sums.x, part[product][2]), to[2]);
    to[3] = fmaf(c.scales.y, fmaf(-c.biases.y, sums.y, part[product][3]), to[3]);
  }
}

__device__ __forceinline__ void CopySixteen(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SharedAddress(shared)), "l"(global)
               : "memory");
}
__device__ __forceinline__ void CopyFour(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(shared)), "l"(global)
               : "memory");
}
__device__ __forceinline__ void WaitForCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Asks for what finishing takes beside the sums: the norm's sums of squares, by the warp of the
// token; old residuals and norm weights.
__device__ __forceinline__ void Prefetch(const W4DecodeParams& p, const PhaseShape& shape,
                                         int32_t warp, int32_t lane) {
  if (p.normed.scale != nullptr && warp < p.tokens) {
    if (lane == 0) CopyFour(At<float>(kGivenAt) + warp, p.normed.scale + warp);
    const float* from = p.normed.square_sums + warp * p.normed.parts;
#pragma unroll 4
    for (int32_t i = lane; i < p.normed.parts; i += 32) {
      CopyFour(At<float>(kSquaresAt) + warp * kSquaresMax + i, from + i);
    }
  }
  if (p.output != DecodeOutput::kAddResidual) return;
  if (p.next.x != nullptr && warp < p.tokens && lane == 0) {
    CopyFour(At<float>(kGivenAt) + 8 + warp, p.next.scale + warp);
  }
  const int32_t tile = warp / 2;
  if (tile >= shape.tiles) return;
  // Two warps a tile: rows in fours for each token, and the weights in eights.
  const int32_t first = decode::RowTile(tile) * layout::kGpuTileRows;
  const int32_t token = warp % 2 * 4 + lane / 8, row = lane % 8 * 4;
  if (row < 16 && token < p.tokens && first + row < p.rows) {
    CopySixteen(At<float>(kOldAt) + (tile * 8 + token) * 16 + row,
                p.residual_out + static_cast<int64_t>(token) * p.rows + first + row);
  }
  if (warp % 2 == 0 && lane >= 4 && lane < 6 && p.next.x != nullptr) {
    const int32_t eight = (lane - 4) * 8;
    if (first + eight < p.rows) {
      CopySixteen(At<half>(kNormAt) + tile * 16 + eight, p.next.norm_weight + first + eight);
    }
  }
}

// What the results of a normed input are multiplied by, and what the next input is.
__device__ __forceinline__ void StoreFactors(const W4DecodeParams& p, int32_t warp, int32_t lane) {
  WaitForCopies();
  if (warp >= p.tokens) return;
  __syncwarp();
  float factor = 1;
  if (p.normed.scale != nullptr) {
    float sum = 0;
#pragma unroll 4
    for (int32_t i = lane; i < p.normed.parts; i += 32) {
      sum += At<float>(kSquaresAt)[warp * kSquaresMax + i];
    }
#pragma unroll
    for (int32_t offset = 16; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    const float inverse = rsqrtf(sum / static_cast<float>(p.columns) + p.normed.epsilon);
    factor = inverse / (At<float>(kGivenAt)[warp] * kNormedInputFactor);
    if (lane == 0 && blockIdx.x == 0) p.normed.inverse_rms_out[warp] = inverse;
  }
  if (lane != 0) return;
  At<float>(kFactorsAt)[warp] = factor;
  At<float>(kScalesAt)[warp] = At<float>(kGivenAt)[8 + warp] * kNormedInputFactor;
}

// One row of one token: adds what the warps left and stores it. Called by eight warps of a round,
// each with a row tile and two tokens: a quarter of the lanes takes four warps' sums, then one
// token and half of the rows.
__device__ __forceinline__ void Finish(const W4DecodeParams& p, const StepShape& step,
                                       int32_t buffer, int32_t first, int32_t tiles, int32_t warp,
                                       int32_t lane) {
  const int32_t tile = warp >> step.pair_shift;
  if (tile >= tiles) return;
  const int32_t pair = warp - (tile << step.pair_shift);
  const int32_t r = lane % 8, token = 2 * pair + lane / 8 % 2, upper = lane / 16;
  const float4* from = At<float4>(kPartialsAt) + buffer * (kRoundBytes / 16) +
                       (((tile * kConsumers + lane / 8 * 4) << step.pair_shift) + pair) * 8 + r;
  float4 sum = from[0];
#pragma unroll
  for (int32_t i = 1; i < 4; ++i) {
    const float4 more = from[i << (step.pair_shift + 3)];
    sum.x += more.x;
    sum.y += more.y;
    sum.z += more.z;
    sum.w += more.w;
  }
  const bool odd = token % 2 != 0;
  const float low = (odd ? sum.y : sum.x) + __shfl_xor_sync(~0u, odd ? sum.x : sum.y, 8);
  const float high = (odd ? sum.w : sum.z) + __shfl_xor_sync(~0u, odd ? sum.z : sum.w, 8);
  float value = (upper != 0 ? high : low) + __shfl_xor_sync(~0u, upper != 0 ? low : high, 16);

  const int32_t row = decode::RowTile(first + tile) * layout::kGpuTileRows + upper * 8 + r;
  const bool exists = token < p.tokens && row < p.rows;
  value *= At<float>(kFactorsAt)[token];
  if (p.bias != nullptr && row < p.rows) value += __half2float(p.bias[row]);
  const int64_t at = static_cast<int64_t>(token) * p.rows + row;
  if (p.output == DecodeOutput::kSiluMul) {
    const float up = __shfl_xor_sync(~0u, value, 16);
    if (!exists || upper != 0) return;
    p.y_half[static_cast<int64_t>(token) * (p.rows / 2) + decode::RowTile(first + tile) * 8 + r] =
        __float2half(__fdividef(value, 1.0f + __expf(-value)) * up);
  } else if (p.output == DecodeOutput::kAddResidual) {
    value += At<float>(kOldAt)[((first + tile) * 8 + token) * 16 + upper * 8 + r];
    if (exists) p.residual_out[at] = value;
    if (p.next.x == nullptr) return;
    if (exists) {
      const float weight = __half2float(At<half>(kNormAt)[(first + tile) * 16 + upper * 8 + r]);
      p.next.x[at] = __float2half(value * weight * At<float>(kScalesAt)[token]);
    }
    float squares = exists ? value * value : 0;
    squares += __shfl_xor_sync(~0u, squares, 1);
    squares += __shfl_xor_sync(~0u, squares, 2);
    squares += __shfl_xor_sync(~0u, squares, 4);
    squares += __shfl_xor_sync(~0u, squares, 16);
    if (token < p.tokens && r == 0 && upper == 0) {
      p.next.square_sums[token * layout::GpuRowTiles(p.rows) + decode::RowTile(first + tile)] =
          squares;
    }
  } else if (exists) {
    if (p.output == DecodeOutput::kHalf) {
      p.y_half[at] = __float2half(value);
    } else {
      p.y_float[at] = value;
    }
  }
}

// What a warp multiplies of a chunk: `left` slabs from its first on, `ring_left` from its ring's.
struct Share {
  int32_t left, ring_left;
};

// Up to two row tiles against one chunk: acc += W x.
template <typename Reload>
__device__ __forceinline__ void MultiplyChunk(const Ring& ring, const Share& share, int32_t tiles,
                                              int32_t warp, int32_t lane, const Activations& x,
                                              Cursor* cursor, float (&acc)[2][4],
                                              const Reload& reload) {
  using P = Pieces<false>;
  if (share.ring_left > 0) {
    const Cursor a = *cursor;
    const Cursor b = tiles > 1 ? cursor->Ahead(1) : a;
    const int32_t offset = warp / kRings * kWarpSlabs * P::kSlabBytes;
    const int32_t first = a.Wait(ring) + offset;
    const int32_t other = b.Wait(ring) + offset;
    if (share.left > 0) {
      // A slab that lacks meets zeros.
      MultiplyUnit(first, other, share.left > 1 ? P::kSlabBytes : 0, lane, x, acc, reload);
    }
    __syncwarp();
    if (lane == 0) {
      Arrive(ring.Empty(a.slot), 1);
      if (tiles > 1) Arrive(ring.Empty(b.slot), 1);
    }
    *cursor = cursor->Ahead(tiles > 1 ? 2 : 1);
  }
  if (share.left <= 0) {
    reload(0);
    reload(1);
  }
}

// The same of dense weights.
template <typename Reload>
__device__ __forceinline__ void MultiplyDenseChunk(const Ring& ring, const Share& share,
                                                   int32_t tiles, int32_t warp, int32_t lane,
                                                   const Activations& x, Cursor* cursor,
                                                   float (&acc)[2][4], const Reload& reload) {
  using P = Pieces<true>;
  const int32_t pieces = P::Count(share.ring_left);
#pragma unroll 1
  for (int32_t tile = 0; tile < tiles; ++tile) {
    if (share.left > 0) {
      const Cursor piece = cursor->Ahead(warp / kRings);
      const int32_t data = piece.Wait(ring);
      float sum[2][4] = {};
#pragma unroll
      for (int32_t s = 0; s < kWarpSlabs; ++s) {
        if (s >= share.left) break;
#pragma unroll
        for (int32_t ks = 0; ks < 8; ++ks) {
          const uint4 raw = LoadShared128(memory + data + s * P::kSlabBytes + ks * 512 + lane * 16);
          const uint32_t a[4] = {raw.x, raw.y, raw.z, raw.w};
          MmaF16(sum[ks % 2], a, x.b[s][ks][0], x.b[s][ks][1]);
        }
      }
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        const float both = sum[0][i] + sum[1][i];
        acc[0][i] += tile == 0 ? both : 0;
        acc[1][i] += tile == 0 ? 0 : both;
      }
      __syncwarp();
      if (lane == 0) Arrive(ring.Empty(piece.slot), kRingWarps);
    }
    *cursor = cursor->Ahead(pieces);
  }
  reload(0);
  reload(1);
}

// A warp's sums of up to two row tiles of a round, for Finish.
__device__ __forceinline__ void PutSums(const StepShape& step, int32_t buffer, int32_t tile,
                                        int32_t tiles, bool dense, int32_t warp, int32_t lane,
                                        const float (&acc)[2][4]) {
  if (lane % 4 >= 1 << step.pair_shift) return;
  // Quantized rows r + 8 were multiplied by 16 in widening.
  const float high = dense ? 1.0f : 0.0625f;
  float4* to = At<float4>(kPartialsAt) + buffer * (kRoundBytes / 16) +
               ((tile * kConsumers + warp) << (step.pair_shift + 3)) + lane % 4 * 8 + lane / 4;
#pragma unroll
  for (int32_t t = 0; t < 2; ++t) {
    if (tile + t >= tiles) break;
    to[(t * kConsumers) << (step.pair_shift + 3)] =
        make_float4(acc[t][0], acc[t][1], acc[t][2] * high, acc[t][3] * high);
  }
}

// The phase. Every consumer.
__device__ __forceinline__ void Multiply(const Phase& phase, const StepShape& step,
                                         const Ring& ring, int32_t warp, int32_t lane,
                                         Cursor* cursor) {
  const W4DecodeParams& p = phase.given.product;
  const int32_t tile_count = phase.shape.tiles, chunks = phase.shape.chunks;
  if (tile_count <= 0) return;
  const bool dense = p.group == 0;

  Activations x = {};
  LoadHalf(p, 0, 0, warp, lane, &x);
  LoadHalf(p, 0, 1, warp, lane, &x);
  Prefetch(p, phase.shape, warp, lane);
  bool summed = dense;
  const int32_t round_tiles = step.RoundTiles();
#pragma unroll 1
  for (int32_t first = 0, round = 0; first < tile_count; first += round_tiles, ++round) {
    const int32_t tiles = min(round_tiles, tile_count - first);
#pragma unroll 1
    for (int32_t tile = 0; tile < tiles; tile += 2) {
      float acc[2][4] = {};
#pragma unroll 1
      for (int32_t chunk = 0; chunk < chunks; ++chunk) {
        const int32_t begin = chunk * kChunkSlabs;
        const Share share{phase.shape.slabs - begin - FirstSlab(warp),
                          phase.shape.slabs - begin - warp % kRings * kRingSlabs};
        if (chunks > 1 && share.left < kWarpSlabs) {
#pragma unroll
          for (int32_t ks = 0; ks < 8; ++ks) x.b[1][ks][0] = x.b[1][ks][1] = 0;
        }
        if (!summed) {
          SumSlabs(&x);
          summed = chunks == 1;
        }
        const auto reload = [&](int32_t half_slab) {
          if (chunks == 1) return;
          LoadHalf(p, chunk + 1 < chunks ? begin + kChunkSlabs : 0, half_slab, warp, lane, &x);
        };
        const int32_t both = min(2, tiles - tile);
        if (dense) {
          MultiplyDenseChunk(ring, share, both, warp, lane, x, cursor, acc, reload);
        } else {
          MultiplyChunk(ring, share, both, warp, lane, x, cursor, acc, reload);
        }
      }
      PutSums(step, round & 1, tile, tiles, dense, warp, lane, acc);
    }
    if (round == 0) StoreFactors(p, warp, lane);
    Meet();
    if (warp / 8 == (round & 1)) Finish(p, step, round & 1, first, tiles, warp % 8, lane);
  }
}

}  // namespace nibble::cuda::step
