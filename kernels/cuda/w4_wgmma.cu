#include "kernels/cuda/w4_wgmma.h"

#include <algorithm>

#include "kernels/cuda/ceil_divide.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/w4_fixed.cuh"
#include "kernels/cuda/w4_help.cuh"
#include "kernels/cuda/w4_meeting.cuh"
#include "kernels/cuda/w4_output.cuh"
#include "kernels/cuda/w4_wgmma_prompt.cuh"
#include "kernels/cuda/w4_wgmma_stream.cuh"
#include "kernels/cuda/w4_widen.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {
namespace {

constexpr int32_t kClusterMax = 8;

// From the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ float4 LoadFromBlock(uint32_t shared_address, int32_t block) {
  float4 value;
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
      : "r"(shared_address), "r"(block)
      : "memory");
  return value;
}

// A warp's weights of a slab: 16 rows in each part.
template <typename S>
struct SlabWords {
  uint4 words[S::kParts][2];
  half2 scales[S::kParts][S::kGroups];
  uint16_t zeros[S::kParts][S::kGroups];

  __device__ __forceinline__ void Load(const uint8_t* slab, int32_t lane) {
#pragma unroll
    for (int32_t part = 0; part < S::kParts; ++part) {
      const uint8_t* from = slab + part * 4 * S::kRowTileBytes;
      words[part][0] = LoadShared128(from + lane * 16);
      words[part][1] = LoadShared128(from + 512 + lane * 16);
#pragma unroll
      for (int32_t group = 0; group < S::kGroups; ++group) {
        const uint8_t* constants =
            from + layout::kGpuSlabNibbleBytes + group * layout::kGpuGroupBytes;
        scales[part][group] = *reinterpret_cast<const half2*>(constants + lane / 4 * 4);
        zeros[part][group] = *reinterpret_cast<const uint16_t*>(constants + 32 + lane / 4 * 2);
      }
    }
  }
};

template <typename S>
struct Consumer {
  static constexpr int32_t kValues = S::kTokens / 2;
  float acc[S::kParts][kValues];
  // One set is multiplied while the other is made.
  uint32_t a[2][S::kSteps][S::kParts][4];
  float sum[S::kFloatScales ? kValues : 1];  // with kFloatScales: over the slabs before

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int32_t part = 0; part < S::kParts; ++part) {
#pragma unroll
      for (int32_t i = 0; i < kValues; ++i) acc[part][i] = 0;
    }
#pragma unroll
    for (float& value : sum) value = 0;
  }
  __device__ __forceinline__ void Pin() {
#pragma unroll
    for (int32_t part = 0; part < S::kParts; ++part) PinRegisters(acc[part]);
  }

  // B of a k-step of a slab.
  static __device__ __forceinline__ uint64_t Step(uint64_t b, int32_t step) {
    return Further(b, step / 4 * S::kHalfBytes + step % 4 * 32);
  }

  // Multiplies k-steps [set * kSteps, …) of a slab from the fragments in a[set % 2].
  __device__ __forceinline__ void Issue(int32_t set, uint64_t b) {
    WarpgroupFence();
#pragma unroll
    for (int32_t i = 0; i < S::kSteps; ++i) {
#pragma unroll
      for (int32_t part = 0; part < S::kParts; ++part) {
        WarpgroupMma<S::kTokens>::Add(acc[part], a[set % 2][i][part], Step(b, set * S::kSteps + i));
      }
    }
    WarpgroupCommit();
    WarpgroupWait<1>();
  }

  // With kFloatScales: a slab in halves, and its sums by its scales.
  __device__ __forceinline__ void MultiplyUnscaled(const uint8_t* slab, uint64_t b, int32_t lane) {
    SlabWords<S> w;
    w.Load(slab, lane);
    const GroupZeros zeros = MakeZeros(w.zeros[0][0]);
#pragma unroll
    for (int32_t set = 0; set < 2; ++set) {
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) WidenUnscaled(Word(w.words[0][set], i), zeros, a[set][i][0]);
      WarpgroupFence();
#pragma unroll
      for (int32_t i = 0; i < 4; ++i) {
        if (set == 0 && i == 0) {
          WarpgroupMma<S::kTokens>::template Add<false, true>(acc[0], a[set][i][0], Step(b, i));
        } else {
          WarpgroupMma<S::kTokens>::Add(acc[0], a[set][i][0], Step(b, set * 4 + i));
        }
      }
      WarpgroupCommit();
    }
    WarpgroupWait<0>();
    PinRegisters(acc[0]);
    const float2 scale = UnscaledFactors(w.scales[0][0]);
#pragma unroll
    for (int32_t i = 0; i < kValues; ++i) {
      sum[i] += acc[0][i] * (i / 2 % 2 == 0 ? scale.x : scale.y);
    }
  }

  // Of one or two slabs of activations in fixed point.
  __device__ __forceinline__ void MultiplyFixed(const uint8_t* slab, const float* scales,
                                                uint64_t b, bool two, int32_t lane) {
    FixedSlab<S::kTokens> first, second;
    first.Multiply(slab, b, lane);
    if (!two) {
      WarpgroupWait<0>();
      first.AddTo(scales, lane, sum);
      return;
    }
    second.Multiply(slab + S::kSlabBytes, Further(b, 2 * S::kHalfBytes), lane);
    WarpgroupWait<1>();
    first.AddTo(scales, lane, sum);
    WarpgroupWait<0>();
    second.AddTo(scales + S::kScaleBytes / 4, lane, sum);
  }

  // `done` is arrived at when the slab before is no longer read.
  __device__ __forceinline__ void MultiplySlab(const uint8_t* slab, uint64_t b, int32_t lane,
                                               uint64_t* done) {
    if constexpr (S::kFloatScales) {
      MultiplyUnscaled(slab, b, lane);
      return;
    }
    SlabWords<S> w;
    if constexpr (S::kGroup != 0) w.Load(slab, lane);
    GroupConstants constants[S::kParts];
#pragma unroll
    for (int32_t set = 0; set < 8 / S::kSteps; ++set) {
#pragma unroll
      for (int32_t i = 0; i < S::kSteps; ++i) {
        const int32_t step = set * S::kSteps + i;
#pragma unroll
        for (int32_t part = 0; part < S::kParts; ++part) {
          if constexpr (S::kGroup == 0) {
            const uint4 four = LoadShared128(slab + step * 512 + lane * 16);
            a[set % 2][i][part][0] = four.x;
            a[set % 2][i][part][1] = four.y;
            a[set % 2][i][part][2] = four.z;
            a[set % 2][i][part][3] = four.w;
          } else {
            constexpr int32_t kStepsOfGroup = S::kMapGroup / 16;
            if (step % kStepsOfGroup == 0) {
              constants[part] = MakeConstants(w.scales[part][step / kStepsOfGroup],
                                              w.zeros[part][step / kStepsOfGroup]);
            }
            Widen(Word(w.words[part][step / 4], step % 4), constants[part], a[set % 2][i][part]);
          }
        }
      }
      Issue(set, b);
      if (set == 0 && done != nullptr && lane == 0) BarrierArrive(done);
    }
  }

  // With kFloatScales, behind the last slab: results into acc.
  __device__ __forceinline__ void TakeSums() {
#pragma unroll
    for (int32_t i = 0; i < kValues; ++i) acc[0][i] = sum[i];
  }

  __device__ __forceinline__ void MultiplyBy(const float* factors, int32_t lane) {
#pragma unroll
    for (int32_t part = 0; part < S::kParts; ++part) {
#pragma unroll
      for (int32_t i = 0; i < kValues; ++i) {
        acc[part][i] *= factors[i / 4 * 8 + lane % 4 * 2 + i % 2];
      }
    }
  }

  // Leaves the block's part of a tile.
  __device__ __forceinline__ void StorePart(const KernelParams& k, int32_t rank, int32_t row_tile,
                                            int32_t first_token, int32_t lane) {
#pragma unroll
    for (int32_t part = 0; part < S::kParts; ++part) {
      if (row_tile + part * 4 >= layout::GpuRowTiles(k.p.rows)) break;
      StorePartialSums<S::kFactors>(k.p, k.parts, rank, {row_tile + part * 4, first_token, lane},
                                    acc[part]);
    }
  }

  __device__ __forceinline__ void Store(const W4BatchParams& p, const OrderedOutput& next,
                                        int32_t row_tile, int32_t first_token, int32_t lane) {
#pragma unroll
    for (int32_t part = 0; part < S::kParts; ++part) {
      if (row_tile + part * 4 >= layout::GpuRowTiles(p.rows)) break;
      StoreRowTile(p, next, {row_tile + part * 4, first_token, lane}, acc[part]);
    }
  }
};

template <int32_t kThreads>
__device__ __forceinline__ void MeetConsumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// The blocks of a cluster have each multiplied their k: adds their parts up, each block its share
// of the tile, in the blocks' order, and stores it.
template <typename S>
__device__ __forceinline__ void StoreShare(const KernelParams& k, const Place& place,
                                           const Consumer<S>& consumer, int32_t group,
                                           int32_t thread, uint8_t* shared) {
  constexpr int32_t kValues = Consumer<S>::kValues;
  constexpr int32_t kQuads = S::kParts * kValues / 4;
  auto* own = reinterpret_cast<float4*>(shared) + group * kQuads * kGroupThreads + thread;
  MeetConsumers<S::kConsumers * kGroupThreads>();  // no group reads the ring any longer
#pragma unroll
  for (int32_t i = 0; i < kQuads; ++i) {
    const float* from = &consumer.acc[i * 4 / kValues][i * 4 % kValues];
    own[i * kGroupThreads] = make_float4(from[0], from[1], from[2], from[3]);
  }
  ArriveCluster();
  WaitForCluster();
  const int32_t end = (place.rank + 1) * kQuads / k.blocks;
  for (int32_t quad = place.rank * kQuads / k.blocks; quad < end; ++quad) {
    const uint32_t address = SharedAddress(own + quad * kGroupThreads);
    float4 parts[kClusterMax];
#pragma unroll
    for (int32_t block = 0; block < kClusterMax; ++block) {
      if (block < k.blocks) parts[block] = LoadFromBlock(address, block);
    }
    float sum[4] = {parts[0].x, parts[0].y, parts[0].z, parts[0].w};
#pragma unroll
    for (int32_t block = 1; block < kClusterMax; ++block) {
      if (block >= k.blocks) break;
      sum[0] += parts[block].x;
      sum[1] += parts[block].y;
      sum[2] += parts[block].z;
      sum[3] += parts[block].w;
    }
    const int32_t part = quad / (S::kTokens / 8), eight = quad % (S::kTokens / 8);
    const int32_t row_tile =
        place.tile / k.token_tiles * S::kRowTiles + (group * S::kParts + part) * 4 + thread / 32;
    if (row_tile >= layout::GpuRowTiles(k.p.rows)) continue;
    StoreRowTile(k.p, NextInput(k),
                 {row_tile, place.tile % k.token_tiles * S::kTokens + eight * 8, thread % 32}, sum);
  }
  // Others may still read what lies here.
  ArriveCluster();
  WaitForCluster();
}

// The block's chunks of a tile. `behind_first` is called once behind the first one.
template <typename S, typename BehindFirst>
__device__ __forceinline__ void MultiplyTile(const KernelParams& k, const Place& place,
                                             int32_t row_tile, int32_t lane, Ring<S>* ring,
                                             Consumer<S>* consumer,
                                             const BehindFirst& behind_first) {
  consumer->Clear();
  consumer->Pin();
  uint64_t* done = nullptr;
  const auto multiply = [&](int32_t chunk) {
    BarrierWait(ring->Full(ring->stage), ring->phase);
    const uint8_t* slab = ring->W() + row_tile * S::kRowTileBytes;
    const uint64_t b = UniformRows(ring->X());
    const bool two = S::kChunk == 2 && chunk * 2 + 1 < layout::GpuSlabs(k.p.columns);
    if constexpr (S::kFixed) {
      consumer->MultiplyFixed(slab, ring->Scales(), b, two, lane);
    } else {
      consumer->MultiplySlab(slab, b, lane, done);
      if constexpr (S::kChunk == 2) {
        if (two) {
          consumer->MultiplySlab(slab + S::kSlabBytes, Further(b, 2 * S::kHalfBytes), lane,
                                 nullptr);
        }
      }
    }
    done = ring->Empty(ring->stage);
    if (S::kFloatScales && lane == 0) BarrierArrive(done);
    ring->Advance();
  };
  int32_t chunk = place.begin;
  if constexpr (S::kPeeled) {
    multiply(chunk++);
    behind_first();
  }
  for (; chunk < place.end; ++chunk) {
    multiply(chunk);
    if (!S::kPeeled && chunk == place.begin) behind_first();
  }
  WarpgroupWait<0>();
  consumer->Pin();
  if constexpr (S::kFloatScales) {
    consumer->TakeSums();
  } else if (lane == 0) {
    BarrierArrive(done);
  }
}

// What results of normed inputs are multiplied by; a warp sees to some tokens. Sums of squares are
// asked for before a block's first chunk, and waited for behind it.
template <typename S>
struct FactorMaker {
  static constexpr int32_t kOfWarp = (S::kTokens + S::kConsumerWarps - 1) / S::kConsumerWarps;
  static constexpr int32_t kHeld = 2;  // parts of a lane
  float squares[kOfWarp][kHeld], scale[kOfWarp];

  __device__ __forceinline__ void Ask(const KernelParams& k, int32_t warp, int32_t lane) {
    const NormedInput& normed = k.input.normed;
#pragma unroll
    for (int32_t i = 0; i < kOfWarp; ++i) {
      const int32_t token = warp + i * S::kConsumerWarps;
      const bool exists = token < k.p.tokens;
      const float* parts = normed.square_sums + token * normed.parts + lane;
#pragma unroll
      for (int32_t j = 0; j < kHeld; ++j) {
        squares[i][j] = LoadFloatIf(exists && lane + j * 32 < normed.parts, parts + j * 32);
      }
      scale[i] = LoadFloatIf(exists, normed.scale + token);
    }
  }
  __device__ __forceinline__ void Make(const KernelParams& k, const Ring<S>& ring, int32_t warp,
                                       int32_t lane) {
    const NormedInput& normed = k.input.normed;
    PinRegisters(scale);  // or the first use of each would move up to where it is asked for
#pragma unroll
    for (int32_t i = 0; i < kOfWarp; ++i) {
      PinRegisters(squares[i]);
      const int32_t token = warp + i * S::kConsumerWarps;
      if (token >= k.p.tokens) continue;
      float sum = 0;
#pragma unroll
      for (const float part : squares[i]) sum += part;
      for (int32_t part = lane + kHeld * 32; part < normed.parts; part += 32) {
        sum += normed.square_sums[token * normed.parts + part];
      }
      const float mean = __fdividef(SumOfWarp(sum), static_cast<float>(k.p.columns));
      const float inverse = rsqrtf(mean + normed.epsilon);
      if (lane != 0) continue;
      ring.Factors()[token] = __fdividef(inverse, scale[i] * kNormedInputFactor);
      if (blockIdx.x == 0) normed.inverse_rms_out[token] = inverse;
    }
    __syncwarp();
    if (lane == 0) BarrierArrive(ring.Factored());
  }
};

// The first of a warp's pairs of the block's first tile.
template <typename S>
struct FirstPair {
  static constexpr int32_t kSlabs = S::kRowTiles * layout::kGpuTileRows / layout::kGpuSlabColumns;
  int32_t index, token, slab;
  bool exists;

  __device__ __forceinline__ FirstPair(const KernelParams& k, const Place& place, int32_t warp)
      : index(warp * k.blocks + place.rank),
        token(index / kSlabs),
        slab(place.tile * kSlabs + index % kSlabs),
        exists(token < k.p.tokens && slab < layout::GpuSlabs(k.p.rows)) {}
};

// Before its blocks have left their parts: what does not wait for them.
template <typename S>
__device__ __forceinline__ void LoadFirstPair(const KernelParams& k, const Place& place,
                                              int32_t warp, int32_t lane, MeetingPair* pair) {
  const FirstPair<S> first(k, place, warp);
  if (first.exists) pair->Load(k.p, k.input.next, first.token, first.slab, lane);
}

// The block's share of a tile whose parts all its blocks leave. `loaded`: `pair` is the first.
template <typename S>
__device__ __forceinline__ void Meet(const KernelParams& k, const Place& place, int32_t tile,
                                     int32_t warp, int32_t lane, bool loaded, MeetingPair* pair) {
  constexpr int32_t kSlabs = FirstPair<S>::kSlabs;
  for (int32_t index = warp * k.blocks + place.rank; index < kSlabs * k.p.tokens;
       index += S::kConsumerWarps * k.blocks, loaded = false) {
    const int32_t token = index / kSlabs, slab = tile * kSlabs + index % kSlabs;
    if (slab >= layout::GpuSlabs(k.p.rows)) continue;
    if (!loaded) pair->Load(k.p, k.input.next, token, slab, lane);
    FinishPair(k.p, k.input, token, slab, k.blocks, k.ordered_tokens, lane, pair);
  }
}

// Results of SiLU in fixed point: a block's rows are a slab of the next product. `acc` is one row
// tile's.
template <typename S>
__device__ __forceinline__ void StoreFixedSilu(const KernelParams& k, int32_t tile,
                                               const float (&acc)[S::kTokens / 2], int32_t warp,
                                               int32_t lane, uint8_t* shared) {
  auto* results = reinterpret_cast<float*>(shared + S::kResults);
  const float2 bias =
      RowBiases(k.p, (tile * S::kRowTiles + warp) * layout::kGpuTileRows + lane / 4);
  MeetConsumers<S::kConsumers * kGroupThreads>();  // the tile before has left
#pragma unroll
  for (int32_t i = 0; i < S::kTokens / 2; ++i) {
    if (i % 4 >= 2) continue;
    const int32_t token = i / 4 * 8 + lane % 4 * 2 + i % 2;
    results[token * S::kResultRow + warp * 8 + lane / 4] =
        SiluTimes(acc[i] + bias.x, acc[i + 2] + bias.y);
  }
  MeetConsumers<S::kConsumers * kGroupThreads>();
  for (int32_t token = warp; token < k.p.tokens; token += S::kConsumerWarps) {
    const float4 four =
        *reinterpret_cast<const float4*>(results + token * S::kResultRow + lane * 4);
    const float v[4] = {four.x, four.y, four.z, four.w};
    StoreFixed(v, token, tile * layout::kGpuSlabColumns + lane * 4, k.ordered_tokens,
               k.input.next_ordered, k.input.next_scales);
  }
}

// A helper leaves a tile's sums: true. Others add what it has left.
template <typename S>
__device__ __forceinline__ bool HelpWith(const KernelParams& k, const Place& place, int32_t tile,
                                         int32_t thread, Consumer<S>* consumer) {
  if constexpr (S::kHelped) {
    if (k.help.blocks <= 0) return false;
    const Help<S::kTokens, S::kConsumers * kGroupThreads> help(k.input.help, tile, thread);
    if (place.helps) {
      help.Leave(consumer->acc[0]);
      return true;
    }
    help.Add(consumer->acc[0]);
  }
  return false;
}

template <typename S>
__device__ __forceinline__ void Consume(const KernelParams& k, uint8_t* shared, int32_t group) {
  const int32_t thread = static_cast<int32_t>(threadIdx.x) % kGroupThreads;
  const int32_t lane = thread % 32;
  // Of the block's; the next part's: + 4.
  const int32_t row_tile = group * S::kParts * 4 + thread / 32;
  const Place place(k, S::kHelped);
  const int32_t warp = group * 4 + thread / 32;
  if constexpr (S::kFactors) {
    // Norm weights were last read a step ago.
    const FirstPair<S> first(k, place, warp);
    if (k.input.meeting != nullptr && first.exists && lane < 2) {
      PrefetchToL2(k.input.next.norm_weight + first.slab * layout::kGpuSlabColumns + lane * 64);
    }
  }
  WaitForPreviousKernel();
  Ring<S> ring{shared};
  Consumer<S> consumer;
  const bool factors = S::kFactors && k.input.normed.square_sums != nullptr;
  FactorMaker<S> maker;
  if constexpr (S::kFactors) {
    if (factors) maker.Ask(k, warp, lane);
  }
  MeetingPair pair;
  for (int32_t tile = place.tile; tile < k.tiles; tile += place.stride) {
    MultiplyTile<S>(k, place, row_tile, lane, &ring, &consumer, [&] {
      if constexpr (S::kFactors) {
        if (factors && tile == place.tile) maker.Make(k, ring, warp, lane);
      }
    });
    if (HelpWith<S>(k, place, tile, group * kGroupThreads + thread, &consumer)) continue;
    if constexpr (S::kFactors) {
      if (factors) {
        BarrierWait(ring.Factored(), 0);
        consumer.MultiplyBy(ring.Factors(), lane);
      }
    }
    if (k.parts != nullptr) {
      if constexpr (S::kFactors) {
        if (k.input.meeting != nullptr && tile == place.tile) {
          LoadFirstPair<S>(k, place, warp, lane, &pair);
        }
      }
      consumer.StorePart(k, place.rank, tile / k.token_tiles * S::kRowTiles + row_tile,
                         tile % k.token_tiles * S::kTokens, lane);
      continue;
    }
    if (k.blocks > 1) {
      StoreShare<S>(k, place, consumer, group, thread, shared);
      return;
    }
    if constexpr (S::kFixed) {
      if (k.input.next_scales != nullptr) {
        StoreFixedSilu<S>(k, tile, consumer.acc[0], warp, lane, shared);
        continue;
      }
    }
    consumer.Store(k.p, NextInput(k), tile / k.token_tiles * S::kRowTiles + row_tile,
                   tile % k.token_tiles * S::kTokens, lane);
  }
  if constexpr (S::kFactors) {
    if (k.input.meeting == nullptr) return;
    for (int32_t tile = place.tile; tile < k.tiles; tile += place.stride) {
      Meet<S>(k, place, tile, warp, lane, tile == place.tile, &pair);
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1)
    W4WgmmaKernel(const __grid_constant__ KernelParams k) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  if (threadIdx.x == 0) {
    const Ring<S> ring{shared};
    for (int32_t i = 0; i < S::kStages; ++i) {
      BarrierInit(ring.Full(i), 1);
      BarrierInit(ring.Empty(i), S::kConsumerWarps);
    }
    if (S::kFactors) BarrierInit(ring.Factored(), S::kConsumerWarps);
    FenceBarrierInit();
  }
  __syncthreads();
  const int32_t group = static_cast<int32_t>(threadIdx.x) / kGroupThreads;
  if (group == S::kConsumers) {
    GiveRegisters<S::kProducerRegisters>();
    const int32_t thread = static_cast<int32_t>(threadIdx.x) % kGroupThreads;
    Produce<S>(k, shared, thread / 32, thread % 32);
  } else {
    TakeRegisters<S::kConsumerRegisters>();
    Consume<S>(k, shared, group);
  }
#endif
}

// Blocks that share a tile: as many as run at the same time with all tiles' others.
template <typename S>
int32_t BlocksOfTile(int32_t tiles, int32_t chunks, int32_t multiprocessors) {
  for (int32_t blocks = kClusterMax; blocks > 1; --blocks) {
    if (blocks * tiles > multiprocessors || blocks * 2 > chunks) continue;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<uint32_t>(blocks), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<uint32_t>(blocks * tiles));
    config.blockDim = dim3(S::kThreads);
    config.dynamicSmemBytes = S::kBytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int32_t clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, W4WgmmaKernel<S>, &config) == cudaSuccess &&
        clusters >= tiles) {
      return blocks;
    }
  }
  return 1;
}

template <typename S>
cudaError_t LaunchShapeOf(const W4BatchParams& params, const WgmmaInput& input,
                          int32_t multiprocessors, const LaunchOptions& options) {
  const cudaError_t error = cudaFuncSetAttribute(
      W4WgmmaKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (error != cudaSuccess) return error;
  KernelParams k{.p = params, .input = input};
  k.ordered_tokens = layout::GpuOrderedTokens(params.tokens);
  k.token_tiles = k.ordered_tokens / S::kTokens;
  k.tiles = CeilDivide(layout::GpuRowTiles(params.rows), S::kRowTiles) * k.token_tiles;
  k.chunks = CeilDivide(layout::GpuSlabs(params.columns), S::kChunk);
  k.parts = input.meeting != nullptr ? input.meeting : input.parts;
  const bool parts = k.parts != nullptr;
  k.blocks = parts ? W4WgmmaParts(params, multiprocessors)
                   : BlocksOfTile<S>(k.tiles, k.chunks, multiprocessors);
  if (S::kHelped && k.blocks == 1 && input.help != nullptr) {
    k.help = W4WgmmaHelp(params, multiprocessors);
  }
  const int32_t grid = k.help.blocks > 0 ? multiprocessors
                       : k.blocks > 1    ? k.tiles * k.blocks
                                         : std::min(k.tiles, multiprocessors);
  return LaunchKernel(W4WgmmaKernel<S>,
                      {.grid = dim3(static_cast<uint32_t>(grid)),
                       .block = dim3(S::kThreads),
                       .shared_bytes = S::kBytes,
                       .stream = options.stream,
                       .dependent = options.dependent,
                       .cluster = parts ? 1 : k.blocks},
                      k);
}

bool InputFits(const W4BatchParams& params, const WgmmaInput& input, int32_t multiprocessors) {
  const bool meets = input.meeting != nullptr;
  const bool fixed = input.fixed_scales != nullptr, next_fixed = input.next_scales != nullptr;
  if (meets && (params.output != DecodeOutput::kAddResidual || params.rows % 8 != 0)) return false;
  if (fixed && params.group != 128) return false;
  if (next_fixed && input.next_group != 128) return false;
  if (next_fixed && !meets && !(fixed && W4WgmmaFixedSilu(params, multiprocessors))) return false;
  const bool few = meets || fixed || next_fixed || input.normed.square_sums != nullptr;
  if (few && (!kMeetings || params.tokens > kWgmmaMeetingTokens)) return false;
  if ((fixed || next_fixed) && params.tokens > kWgmmaFixedTokens) return false;
  return input.parts == nullptr || params.tokens <= kWgmmaPartsTokens;
}

template <int32_t kGroup, typename... Rest>
cudaError_t LaunchGroup(const W4BatchParams& params, const Rest&... rest) {
  switch (layout::GpuTokenTile(params.tokens)) {
    case 16:
      return LaunchShapeOf<Shape<kGroup, 16>>(params, rest...);
    case 32:
      return LaunchShapeOf<Shape<kGroup, 32>>(params, rest...);
    case 64:
      return LaunchShapeOf<Shape<kGroup, 64>>(params, rest...);
    case 96:
      return LaunchShapeOf<Shape<kGroup, 96>>(params, rest...);
    default:
      return LaunchShapeOf<Shape<kGroup, 128>>(params, rest...);
  }
}

}  // namespace

cudaError_t W4Wgmma(const W4BatchParams& params, const WgmmaInput& input, int32_t multiprocessors,
                    const LaunchOptions& options) {
  if (params.tokens < 1 || params.columns % 8 != 0) return cudaErrorInvalidValue;
  if (!InputFits(params, input, multiprocessors)) return cudaErrorInvalidValue;
  if (PromptTilesFit(params, multiprocessors)) {
    return W4WgmmaPrompt(params, input, multiprocessors, options);
  }
  switch (params.group) {
    case 0:
      return LaunchGroup<0>(params, input, multiprocessors, options);
    case 32:
      return LaunchGroup<32>(params, input, multiprocessors, options);
    case 64:
      return LaunchGroup<64>(params, input, multiprocessors, options);
    case 128:
      if constexpr (kMeetings) {
        if (input.fixed_scales != nullptr) {
          return LaunchShapeOf<Shape<128, kWgmmaFixedTokens, true>>(params, input, multiprocessors,
                                                                    options);
        }
      }
      return LaunchGroup<128>(params, input, multiprocessors, options);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
