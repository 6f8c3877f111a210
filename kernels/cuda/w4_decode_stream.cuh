// How a warp of the decode product gets its weights and activations and multiplies them; the
// kernel around it is w4_decode.cu.
#pragma once

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/w4_decode.h"
#include "kernels/cuda/w4_widen.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT::decode {

using layout::GpuKIndex;
using layout::GpuSlabBytes;
using layout::kGpuSlabNibbleBytes;

constexpr int32_t kDenseSlabBytes = layout::kGpuTileRows * layout::kGpuSlabColumns * 2;
constexpr int32_t kRingBytes = 104 * 1024;  // of a block
constexpr int32_t kWarps = 8;
constexpr int32_t kThreads = kWarps * 32;
// A warp multiplies a unit of four slabs at a time, whose products interleave: a chain of dependent
// tensor-core instructions would wait for each one's latency.
constexpr int32_t kUnitProducts = 4;

// What a kernel instance is compiled for: 1, 2, 4, 8 or 16 tokens at most. Two ways to walk a row
// tile's k:
//   resident: a warp's range of k is at most kUnits units, whose activations stay in registers for
//             the whole launch;
//   streamed: units take two slabs of each of two row tiles, or one of each of four, which reads
//             activations half as often; those of a unit are loaded while the unit before is
//             multiplied. Any length of row.
// Products have eight columns. Those that tokens leave free hold activations of the slabs behind:
// a slab's product is right in its own columns alone, and registers that lanes would spend on
// tokens that do not exist keep more products in flight.
template <int32_t kGroupT, int32_t kTokensT, int32_t kRowTilesT, int32_t kUnitsT = 1>
struct Shape {
  static constexpr int32_t kGroup = kGroupT;    // 0 = dense fp16
  static constexpr int32_t kTokens = kTokensT;  // columns of a slab
  static constexpr int32_t kTokenTiles = (kTokens + 7) / 8;
  static constexpr int32_t kSharing = kTokens < 8 ? 8 / kTokens : 1;  // slabs of a fragment
  static constexpr int32_t kRowTiles = kRowTilesT;                    // of a unit
  static constexpr bool kResident = kRowTiles == 1;
  static constexpr int32_t kUnits = kUnitsT;  // of resident activations
  static constexpr int32_t kUnitSlabs = kUnitProducts / kRowTiles;
  static constexpr int32_t kRowSlabs = kUnits * kUnitSlabs;  // of a warp, at most, if resident
  static constexpr int32_t kFragments = kRowSlabs / kSharing;
  static_assert(kRowSlabs % kSharing == 0 && (kGroup != 0 || kSharing == 1));
  // Which fragment a unit's product takes.
  static constexpr __host__ __device__ int32_t Fragment(int32_t unit, int32_t product) {
    return (unit * kUnitSlabs + product % kUnitSlabs) / kSharing;
  }
  static constexpr bool kBytes = kBytesWiden && kGroup == 128 && kTokens == 8;
  // Fragments that lie in shared memory instead: eight tokens' would leave products in flight no
  // registers.
  static constexpr int32_t kPutAside = kGroup != 0 && kResident && kTokens == 8 ? 2 : 0;
  // Registers for the kernel before or behind beside this one; two token tiles take them all.
  static constexpr int32_t kBlocksTogether = kTokenTiles == 1 ? 2 : 1;
  static constexpr int32_t kSlabBytes = kGroup == 0 ? kDenseSlabBytes : GpuSlabBytes(kGroup);
  static constexpr int32_t kCopyBytes = (kGroup == 0 ? 1 : kUnitSlabs) * kSlabBytes;
  static constexpr int32_t kSlotBytes = (kGroup == 0 ? 1 : kRowTiles) * kCopyBytes;
  static constexpr int32_t kSlots = (kRingBytes / kWarps - kPutAside * 4 * 32 * 16) / kSlotBytes;
  static_assert(kSlots >= 2);
  static constexpr int32_t kGroupsOfSlab = kGroup == 0 ? 1 : layout::kGpuSlabColumns / kGroup;
};

// A warp's activations: [fragments][k-step][token tile] B fragments, each shared by
// kSharing slabs, and where they are resident, the sums over k of every group for the columns 2c,
// 2c + 1 of this lane's results.
template <typename S>
struct Fragments {
  uint32_t b[S::kFragments][8][S::kTokenTiles][2];
  static constexpr int32_t kSumBytes =
      S::kResident ? S::kFragments * S::kGroupsOfSlab * S::kTokenTiles * 8 * 4 : 0;
  float* sums;
  static constexpr int32_t kAsideBytes = S::kPutAside * 4 * 32 * 16;  // of a warp
  uint4* aside;

  // The last fragments leave their registers.
  __device__ __forceinline__ void PutAside(int32_t lane) const {
#pragma unroll
    for (int32_t i = 0; i < S::kPutAside * 4; ++i) {
      const uint32_t(&two)[8][S::kTokenTiles][2] = b[S::kFragments - S::kPutAside + i / 4];
      const int32_t ks = i % 4 * 2;
      aside[i * 32 + lane] =
          make_uint4(two[ks][0][0], two[ks][0][1], two[ks + 1][0][0], two[ks + 1][0][1]);
    }
  }
  // Those of two k-steps.
  __device__ __forceinline__ void TakeAside(int32_t lane, int32_t ks,
                                            uint4 (&two)[S::kPutAside + 1]) const {
#pragma unroll
    for (int32_t i = 0; i < S::kPutAside; ++i) two[i] = aside[(i * 4 + ks / 2) * 32 + lane];
  }

  // Of columns 2c, 2c + 1: those of this lane's results.
  __device__ __forceinline__ float2* Sums(int32_t s, int32_t group, int32_t tile,
                                          int32_t lane) const {
    const int32_t at = ((s * S::kGroupsOfSlab + group) * S::kTokenTiles + tile) * 8;
    return reinterpret_cast<float2*>(sums + at + lane % 4 * 2);
  }
};

// Slabs [begin, end) of this warp.
struct WarpRange {
  int32_t begin;
  int32_t end;
};
__device__ __forceinline__ WarpRange SlabRange(int32_t slabs, int32_t part, int32_t parts) {
  return {slabs * part / parts, slabs * (part + 1) / parts};
}

// Half a unit's activations, k-steps [4 * half, 4 * half + 4) of its slabs, which begin at `slab`
// and end before `end`: a lane has runs of eight. All loads go out before the first is used: a load
// that waits for the one before it costs a trip to the L2. Columns and tokens that do not exist are
// zero.
template <typename S>
__device__ __forceinline__ void LoadHalfUnit(const W4DecodeParams& p, int32_t slab, int32_t end,
                                             int32_t half, int32_t lane, Fragments<S>* x) {
  constexpr int32_t kGroup = S::kGroup == 0 ? 128 : S::kGroup;
  const int32_t column = lane / 4;
  const bool ordered = p.x_order.exists();
  const int32_t of_token = ordered ? 32 : p.columns;
  const int32_t of_slab = ordered ? S::kTokenTiles * 1024 : layout::kGpuSlabColumns;
  const int32_t of_lane = ordered ? 8 : kGroup / 4;
#pragma unroll
  for (int32_t s = 0; s < S::kFragments; ++s) {
    const int32_t own = slab + s * S::kSharing + (S::kSharing > 1 ? column / S::kTokens : 0);
    const int32_t in_tile = S::kSharing > 1 ? column % S::kTokens : column;
    const auto* from = p.x + in_tile * of_token + own * of_slab + lane % 4 * of_lane;
#pragma unroll
    for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
      const int32_t token = tile * 8 + in_tile;
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        const int32_t ks = 4 * half + 2 * i;
        const int32_t k = own * layout::kGpuSlabColumns + GpuKIndex(ks, lane % 4, 0, kGroup);
        const bool valid = own < end && token < p.tokens && k < p.columns;
        const int32_t of_steps = ordered ? ks / 2 * 256 : GpuKIndex(ks, 0, 0, kGroup);
        const int32_t of_tile = ordered ? 1024 : 8 * p.columns;
        const uint4 eight = LoadIf(valid, from + tile * of_tile + of_steps);
        x->b[s][ks][tile][0] = eight.x;
        x->b[s][ks][tile][1] = eight.y;
        x->b[s][ks + 1][tile][0] = eight.z;
        x->b[s][ks + 1][tile][1] = eight.w;
      }
    }
  }
}

// What has been reckoned before the kernel before has ended goes by way of shared memory: else the
// compiler would put the reckoning off until it is used.
__device__ __forceinline__ void PutWords(float4* shared, const uint4& words) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(SharedAddress(shared)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}
__device__ __forceinline__ uint4 TakeWords(const float4* shared) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(SharedAddress(shared))
               : "memory");
  return words;
}

// The first unit's activations of a launch, or all where they are resident: all that can be
// reckoned of their places is, before the kernel before has ended.
template <typename S>
struct FirstLoads {
  static_assert(S::kTokenTiles == 1);
  static constexpr int32_t kGroup = S::kGroup == 0 ? 128 : S::kGroup;
  const Real16* from;   // this lane's first
  uint32_t exists = 0;  // bit 4 s + ks / 2

  __device__ __forceinline__ FirstLoads(const W4DecodeParams& p, const WarpRange& range,
                                        int32_t lane) {
    const int32_t column = lane / 4;
    const int32_t own = range.begin + (S::kSharing > 1 ? column / S::kTokens : 0);
    const int32_t token = S::kSharing > 1 ? column % S::kTokens : column;
    const bool ordered = p.x_order.exists();
    from = p.x + token * (ordered ? 32 : p.columns) +
           own * (ordered ? 1024 : layout::kGpuSlabColumns) + lane % 4 * (ordered ? 8 : kGroup / 4);
#pragma unroll
    for (int32_t s = 0; s < S::kFragments; ++s) {
      const int32_t slab = own + s * S::kSharing;
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        const int32_t k = slab * layout::kGpuSlabColumns + GpuKIndex(2 * i, lane % 4, 0, kGroup);
        const bool real = slab < range.end && token < p.tokens && k < p.columns;
        exists |= static_cast<uint32_t>(real) << (4 * s + i);
      }
    }
  }
  __device__ __forceinline__ void Put(float4* shared) const {
    const auto bits = reinterpret_cast<uint64_t>(from);
    PutWords(shared,
             make_uint4(static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), exists, 0));
  }
  explicit __device__ __forceinline__ FirstLoads(const float4* shared) {
    const uint4 put = TakeWords(shared);
    from = reinterpret_cast<const Real16*>(uint64_t{put.y} << 32 | put.x);
    exists = put.z;
  }
  template <bool kOrdered>
  __device__ __forceinline__ void LoadFrom(Fragments<S>* x) const {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
#pragma unroll
      for (int32_t s = 0; s < S::kFragments; ++s) {
        const int32_t of_slab = s * S::kSharing * (kOrdered ? 1024 : layout::kGpuSlabColumns);
        const int32_t of_steps = kOrdered ? i * 256 : GpuKIndex(2 * i, 0, 0, kGroup);
        const uint4 eight = LoadIf((exists & (1u << (4 * s + i))) != 0, from + of_slab + of_steps);
        x->b[s][2 * i][0][0] = eight.x;
        x->b[s][2 * i][0][1] = eight.y;
        x->b[s][2 * i + 1][0][0] = eight.z;
        x->b[s][2 * i + 1][0][1] = eight.w;
      }
    }
  }
  __device__ __forceinline__ void Load(bool ordered, Fragments<S>* x) const {
    if (ordered) {
      LoadFrom<true>(x);
    } else {
      LoadFrom<false>(x);
    }
  }
};

// As LoadFloatIf, a number that is always there.
__device__ __forceinline__ uint32_t LoadWord(const uint32_t* global) {
  uint32_t value;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(global));
  return value;
}

// The sums come from the tensor cores: a product with ones puts every token's sum where the lane
// needs it.
template <typename S>
__device__ __forceinline__ void SumGroups(int32_t lane, Fragments<S>* x) {
  if constexpr (S::kGroup == 0 || !S::kResident) return;
  constexpr int32_t kSteps = (S::kGroup == 0 ? 128 : S::kGroup) / 16;
  // Few products: several chains of each, or every one would wait for the one before.
  constexpr int32_t kSums = S::kFragments * S::kTokenTiles;
  constexpr int32_t kChains = kSums == 1 && kSteps >= 4 ? 4 : kSums < kUnitProducts ? 2 : 1;
  const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
  for (int32_t group = 0; group < S::kGroupsOfSlab; ++group) {
    float sum[S::kFragments][S::kTokenTiles][kChains][4] = {};
#pragma unroll
    for (int32_t ks = group * kSteps; ks < (group + 1) * kSteps; ++ks) {
#pragma unroll
      for (int32_t s = 0; s < S::kFragments; ++s) {
#pragma unroll
        for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
          Mma(sum[s][tile][ks % kChains], ones, x->b[s][ks][tile][0], x->b[s][ks][tile][1]);
        }
      }
    }
#pragma unroll
    for (int32_t s = 0; s < S::kFragments; ++s) {
#pragma unroll
      for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
        const float(&chain)[kChains][4] = sum[s][tile];
        float2 all = make_float2(chain[0][0], chain[0][1]);
#pragma unroll
        for (int32_t i = 1; i < kChains; ++i) {
          all.x += chain[i][0];
          all.y += chain[i][1];
        }
        if (lane < 4) *x->Sums(s, group, tile, lane) = all;
      }
    }
  }
}

// Fragments hold biased weights (w4_widen.cuh). What is too much is taken off the sum of the group,
// not off every weight.
struct Constants {
  float2 scales;  // of row r, of row r + 8
  float2 biases;  // what widening and zeros added to row r, to row r + 8
};
template <bool kBytes>
__device__ __forceinline__ Constants LoadConstants(const uint8_t* slab, int32_t group,
                                                   int32_t lane) {
  const uint8_t* constants = slab + kGpuSlabNibbleBytes + group * layout::kGpuGroupBytes;
  const half2 scales = *reinterpret_cast<const half2*>(constants + lane / 4 * 4);
  const uint32_t zeros = *reinterpret_cast<const uint16_t*>(constants + 32 + lane / 4 * 2);
  return {__half22float2(scales), Biases<kBytes>(zeros)};
}

// The words of nibbles of `kCount` k-steps from `first` on, for every product of a unit.
template <typename S, int32_t kCount>
__device__ __forceinline__ void LoadWords(const uint8_t* data, int32_t lane, int32_t first,
                                          uint32_t (&words)[kUnitProducts][kCount]) {
#pragma unroll
  for (int32_t product = 0; product < kUnitProducts; ++product) {
    const uint8_t* at =
        data + product * S::kSlabBytes + first / 4 * 512 + lane * 16 + first % 4 * 4;
    if constexpr (kCount == 4) {
      const uint4 four = LoadShared128(at);
      words[product][0] = four.x;
      words[product][1] = four.y;
      words[product][2] = four.z;
      words[product][3] = four.w;
    } else {
      const uint2 two = *reinterpret_cast<const uint2*>(at);
      words[product][0] = two.x;
      words[product][1] = two.y;
    }
  }
}

// Of the products of the slabs that share a fragment, the one whose columns this lane has: it moves
// to the first one's place.
template <typename S>
__device__ __forceinline__ void TakeOwn(int32_t lane, float (*part)[S::kTokenTiles][4]) {
  const int32_t own = lane % 4 * 2 / S::kTokens;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    if constexpr (S::kSharing == 8) {
      part[0][0][i] = lane % 2 == 0 ? part[i % 2][0][i] : part[2 + i % 2][0][i];
    } else if constexpr (S::kSharing == 4) {
      const float low = own % 2 == 0 ? part[0][0][i] : part[1][0][i];
      const float high = own % 2 == 0 ? part[2][0][i] : part[3][0][i];
      part[0][0][i] = own < 2 ? low : high;
    } else if constexpr (S::kSharing == 2) {
      part[0][0][i] = own == 0 ? part[0][0][i] : part[1][0][i];
    }
  }
}

// A group of the slabs that share a fragment with those of another unit has ended: a lane has
// columns of two of them, or of none.
template <typename S>
__device__ __forceinline__ void FinishOneToken(const uint8_t* data, int32_t unit, int32_t group,
                                               int32_t lane, const Fragments<S>& x,
                                               float (&part)[kUnitProducts][1][4],
                                               float (&acc)[4]) {
  TakeOwn<S>(lane, part);
  const float2 sums = *x.Sums(unit / 2, group, 0, lane);
  const float exists = lane % 4 / 2 == unit % 2 ? 1.0f : 0.0f;
#pragma unroll
  for (int32_t i = 0; i < 2; ++i) {
    const Constants c =
        LoadConstants<S::kBytes>(data + (lane % 2 * 2 + i) * S::kSlabBytes, group, lane);
    const float sum = i == 0 ? sums.x : sums.y;
    acc[0] = fmaf(c.scales.x * exists, fmaf(-c.biases.x, sum, part[0][0][i]), acc[0]);
    acc[2] = fmaf(c.scales.y * exists, fmaf(-c.biases.y, sum, part[0][0][2 + i]), acc[2]);
  }
#pragma unroll
  for (int32_t product = 0; product < kUnitProducts; ++product) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) part[product][0][i] = 0;
  }
}

// A group has ended: its parts, freed of what widening added, times their scales go to acc.
template <typename S>
__device__ __forceinline__ void FinishGroup(
    const uint8_t* data, int32_t unit, int32_t group, int32_t lane, const Fragments<S>& x,
    float (&streamed_sums)[S::kFragments][S::kTokenTiles][4],
    float (&part)[kUnitProducts][S::kTokenTiles][4],
    float (&acc)[S::kRowTiles][S::kTokenTiles][4]) {
  const int32_t own = S::kSharing > 1 ? lane % 4 * 2 / S::kTokens : 0;
#pragma unroll
  for (int32_t product = 0; product < kUnitProducts; product += S::kSharing) {
    const int32_t s = S::Fragment(unit, product);
    const Constants c =
        LoadConstants<S::kBytes>(data + (product + own) * S::kSlabBytes, group, lane);
    TakeOwn<S>(lane, part + product);
#pragma unroll
    for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
      float2 sums;
      if constexpr (S::kResident) {
        sums = *x.Sums(s, group, tile, lane);
      } else {
        sums = make_float2(streamed_sums[s][tile][0], streamed_sums[s][tile][1]);
      }
      float(&to)[4] = acc[product / S::kUnitSlabs][tile];
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        const float sum = i == 0 ? sums.x : sums.y;
        const float(&both)[4] = part[product][tile];
        const float upper = S::kBytes ? both[2 + i] - both[i] : both[2 + i];
        const float low = fmaf(-c.biases.x, sum, both[i]);
        const float high = fmaf(-c.biases.y, sum, upper);
        to[i] = fmaf(c.scales.x, low, to[i]);
        to[2 + i] = fmaf(c.scales.y, high, to[2 + i]);
      }
    }
  }
#pragma unroll
  for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
#pragma unroll
      for (int32_t s = 0; s < S::kFragments; ++s) streamed_sums[s][tile][i] = 0;
#pragma unroll
      for (int32_t product = 0; product < kUnitProducts; ++product) part[product][tile][i] = 0;
    }
  }
}

// acc += W x over a unit; slabs beyond the warp's meet activations that are zero. `reload(half)` is
// called when the activations of half a unit have been used for the last time.
template <typename S, typename Reload>
__device__ __forceinline__ void MultiplyW4(const uint8_t* data, int32_t unit, int32_t lane,
                                           const Fragments<S>& x,
                                           float (&acc)[S::kRowTiles][S::kTokenTiles][4],
                                           const Reload& reload) {
  constexpr int32_t kSteps = S::kGroup / 16;
  constexpr int32_t kStepsAtOnce = S::kResident && kSteps >= 4 ? 4 : 2;
  const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
  float part[kUnitProducts][S::kTokenTiles][4] = {};
  float sums[S::kFragments][S::kTokenTiles][4] = {};
#pragma unroll
  for (int32_t first = 0; first < 8; first += kStepsAtOnce) {
    uint32_t words[kUnitProducts][kStepsAtOnce];
    LoadWords<S, kStepsAtOnce>(data, lane, first, words);
    uint4 aside[S::kPutAside + 1];
#pragma unroll
    for (int32_t step = 0; step < kStepsAtOnce; ++step) {
      if (step % 2 == 0) x.TakeAside(lane, first + step, aside);
#pragma unroll
      for (int32_t product = 0; product < kUnitProducts; ++product) {
        const int32_t s = S::Fragment(unit, product);
        const int32_t taken = s + S::kPutAside - S::kFragments;
        uint32_t a[4];
        WidenBiased<S::kBytes>(words[product][step], a);
#pragma unroll
        for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
          if (taken >= 0) {
            const uint4 two = aside[taken];
            Mma(part[product][tile], a, step % 2 == 0 ? two.x : two.z,
                step % 2 == 0 ? two.y : two.w);
            continue;
          }
          const uint32_t(&b)[2] = x.b[s][first + step][tile];
          Mma(part[product][tile], a, b[0], b[1]);
          if (!S::kResident && product < S::kUnitSlabs && product % S::kSharing == 0) {
            Mma(sums[s][tile], ones, b[0], b[1]);
          }
        }
      }
    }
    if ((first + kStepsAtOnce) % 4 == 0) reload(first / 4);
    if ((first + kStepsAtOnce) % kSteps == 0) {
      const int32_t group = (first + kStepsAtOnce) / kSteps - 1;
      if constexpr (S::kSharing > kUnitProducts) {
        FinishOneToken<S>(data, unit, group, lane, x, part, acc[0][0]);
      } else {
        FinishGroup<S>(data, unit, group, lane, x, sums, part, acc);
      }
    }
  }
}

template <typename S>
__device__ __forceinline__ void MultiplyDense(const uint8_t* slab, int32_t lane,
                                              const uint32_t (&x)[8][S::kTokenTiles][2],
                                              float (&acc)[S::kTokenTiles][4]) {
  float odd[S::kTokenTiles][4] = {};
#pragma unroll
  for (int32_t ks = 0; ks < 8; ++ks) {
    const uint4 raw = LoadShared128(slab + ks * 512 + lane * 16);
    const uint32_t a[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
      Mma(ks % 2 == 0 ? acc[tile] : odd[tile], a, x[ks][tile][0], x[ks][tile][1]);
    }
  }
#pragma unroll
  for (int32_t tile = 0; tile < S::kTokenTiles; ++tile) {
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) acc[tile][i] += odd[tile][i];
  }
}

// One warp's stream of weights through its ring of shared memory: for each kRowTiles row tiles of
// the block the warp's units; of dense weights a slot holds one slab, a unit's slabs follow each
// other and of each slab the row tiles. Every instruction here is spent once a unit by every warp.
template <typename S>
struct WeightStream {
  const uint8_t* ring;
  uint32_t ring_address;
  uint32_t full;         // barriers of the slots
  const uint8_t* next;   // the warp's next slab of the row tiles being asked for
  uint32_t tile_stride;  // bytes from one row tile of this block to its next
  int32_t slabs;         // of this warp in a row tile
  int32_t tiles_left;    // not yet asked for
  int32_t slab = 0;      // being asked for
  int32_t tile = 0;      // being asked for, of dense weights
  int32_t slot = 0;      // being read, then refilled
  uint32_t phase = 0;

  // Asks for what comes next, if anything is left, into `to_slot`: lane 0 does, but all lanes go
  // along, since what is the same in all of a warp costs no registers and no instructions of lanes.
  __device__ __forceinline__ void Issue(int32_t to_slot, int32_t lane) {
    if (tiles_left <= 0) return;
    const uint32_t to = ring_address + static_cast<uint32_t>(to_slot * S::kSlotBytes);
    const uint32_t barrier = full + static_cast<uint32_t>(to_slot) * 8;
    const uint64_t policy = EvictFirstPolicy();
    if constexpr (S::kGroup == 0) {
      if (lane == 0) {
        BarrierExpect(barrier, S::kSlabBytes);
        BulkCopy(to, next + tile * tile_stride, S::kSlabBytes, barrier, policy);
      }
      if (++tile < min(S::kRowTiles, tiles_left)) return;
      tile = 0;
      next += S::kSlabBytes;
      slab += 1;
    } else if constexpr (S::kResident && S::kUnits == 1) {
      if (lane == 0) {
        const int32_t bytes = slabs * S::kSlabBytes;
        BarrierExpect(barrier, bytes);
        BulkCopy(to, next, bytes, barrier, policy);
      }
      next += tile_stride;
      tiles_left -= 1;
      return;
    } else {
      const int32_t bytes = min(S::kUnitSlabs, slabs - slab) * S::kSlabBytes;
      if (lane == 0) {
        const int32_t tiles = min(S::kRowTiles, tiles_left);
        BarrierExpect(barrier, tiles * bytes);
#pragma unroll
        for (int32_t t = 0; t < S::kRowTiles; ++t) {
          if (t < tiles) {
            BulkCopy(to + t * S::kCopyBytes, next + static_cast<int64_t>(t) * tile_stride, bytes,
                     barrier, policy);
          }
        }
      }
      next += bytes;
      slab += S::kUnitSlabs;
    }
    if (slab < slabs) return;
    next += static_cast<int64_t>(S::kRowTiles) * tile_stride - slabs * S::kSlabBytes;
    slab = 0;
    tiles_left -= S::kRowTiles;
  }
  __device__ __forceinline__ const uint8_t* Acquire() const {
    BarrierWait(full + static_cast<uint32_t>(slot) * 8, phase);
    return ring + slot * S::kSlotBytes;
  }
  __device__ __forceinline__ void Release(int32_t lane) {
    __syncwarp();
    Issue(slot, lane);
    if (++slot == S::kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// Up to kRowTiles row tiles: acc = W x over this warp's range of k. Streamed activations of the
// range's first unit lie in x at the beginning and, for the row tiles that follow, at the end.
template <typename S>
__device__ __forceinline__ void MultiplyTiles(const W4DecodeParams& p, const WarpRange& range,
                                              WeightStream<S>* stream, int32_t lane, int32_t tiles,
                                              Fragments<S>* x,
                                              float (&acc)[S::kRowTiles][S::kTokenTiles][4]) {
  if constexpr (S::kResident && S::kGroup != 0) {
#pragma unroll
    for (int32_t unit = 0; unit < S::kUnits; ++unit) {
      if (range.begin + unit * S::kUnitSlabs >= range.end) break;
      MultiplyW4<S>(stream->Acquire(), unit, lane, *x, acc, [](int32_t) {});
      stream->Release(lane);
    }
  } else {
    for (int32_t begin = range.begin; begin < range.end; begin += S::kUnitSlabs) {
      const int32_t following =
          begin + S::kUnitSlabs < range.end ? begin + S::kUnitSlabs : range.begin;
      const auto reload = [&](int32_t half) {
        if constexpr (!S::kResident) LoadHalfUnit<S>(p, following, range.end, half, lane, x);
      };
      if constexpr (S::kSharing > 1) {
        // Registers for a whole unit's lead.
        Fragments<S> next;
        LoadHalfUnit<S>(p, following, range.end, 0, lane, &next);
        LoadHalfUnit<S>(p, following, range.end, 1, lane, &next);
        MultiplyW4<S>(stream->Acquire(), 0, lane, *x, acc, [](int32_t) {});
        stream->Release(lane);
        *x = next;
      } else if constexpr (S::kGroup != 0) {
        MultiplyW4<S>(stream->Acquire(), 0, lane, *x, acc, reload);
        stream->Release(lane);
      } else {
#pragma unroll
        for (int32_t s = 0; s < S::kUnitSlabs; ++s) {
          if (begin + s >= range.end) break;
#pragma unroll
          for (int32_t t = 0; t < S::kRowTiles; ++t) {
            if (t >= tiles) break;
            MultiplyDense<S>(stream->Acquire(), lane, x->b[s], acc[t]);
            stream->Release(lane);
          }
        }
        reload(0);
        reload(1);
      }
    }
  }
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT::decode
