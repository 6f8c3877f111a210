// Products of prompts. The blocks of a cluster, two or four, compute 128 rows each of the same 256
// tokens: each brings its part of the tokens into the shared memory of all, and the weights of its
// own rows. Two warpgroups of 64 rows each widen weights in registers and multiply.
#include "kernels/cuda/w4_wgmma_prompt.cuh"

#include <algorithm>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/w4_output.cuh"
#include "kernels/cuda/w4_widen.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {
namespace {

constexpr int32_t kTokens = kPromptTokens;
constexpr int32_t kGroupThreads = 128;
constexpr int32_t kConsumers = 2;  // warpgroups
constexpr int32_t kThreads = (kConsumers + 1) * kGroupThreads;
constexpr int32_t kRowTiles = 8;  // of a block
constexpr int32_t kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int32_t kHalfBytes = kTokens * 128;  // 64 k of the tile's tokens
constexpr int32_t kSlabsX = 3, kStagesX = 2 * kSlabsX;
constexpr int32_t kStagedBytes = 4096;  // results of a warpgroup on their way out

struct KernelParams {
  W4BatchParams p;
  WgmmaInput input;
  int32_t ordered_tokens;
  int32_t token_tiles;
  int32_t row_tiles;
  int32_t tiles;  // of a cluster
  int32_t slabs;  // along k
  bool staged;    // results lie so that 16 bytes go out at a time
};

template <int32_t kGroupT, int32_t kBlocksT>
struct Shape {
  static constexpr int32_t kGroup = kGroupT;
  static constexpr int32_t kBlocks = kBlocksT;                      // of a cluster
  static constexpr int32_t kClusterRowTiles = kBlocks * kRowTiles;  // 128 columns of SiLU's results
  static constexpr int32_t kSlabBytes = layout::GpuSlabBytes(kGroup);
  static constexpr int32_t kGroups = layout::kGpuSlabColumns / kGroup;
  static constexpr int32_t kStagesW = kGroup == 128 ? 3 : 2;
  static constexpr int32_t kStageW = kRowTiles * kSlabBytes;
  static constexpr int32_t kWeights = kStagesX * kHalfBytes;
  static constexpr int32_t kStaged = kWeights + kStagesW * kStageW;
  static constexpr int32_t kBarriers = kStaged + kConsumers * kStagedBytes;
  static constexpr int32_t kBytes = kBarriers + 2 * (kStagesX + kStagesW) * 8;
  static_assert(kBytes <= 227 * 1024);
};

template <typename S>
struct Barriers {
  uint64_t* first;
  __device__ __forceinline__ explicit Barriers(uint8_t* shared)
      : first(reinterpret_cast<uint64_t*>(shared + S::kBarriers)) {}
  [[nodiscard]] __device__ __forceinline__ uint64_t* FullX(int32_t i) const { return first + i; }
  [[nodiscard]] __device__ __forceinline__ uint64_t* EmptyX(int32_t i) const {
    return first + kStagesX + i;
  }
  [[nodiscard]] __device__ __forceinline__ uint64_t* FullW(int32_t i) const {
    return first + 2 * kStagesX + i;
  }
  [[nodiscard]] __device__ __forceinline__ uint64_t* EmptyW(int32_t i) const {
    return first + 2 * kStagesX + S::kStagesW + i;
  }
  __device__ __forceinline__ void Init() const {
    for (int32_t i = 0; i < kStagesX; ++i) {
      BarrierInit(FullX(i), 1);
      BarrierInit(EmptyX(i), S::kBlocks * kConsumers * 4);  // the warps of all blocks
    }
    for (int32_t i = 0; i < S::kStagesW; ++i) {
      BarrierInit(FullW(i), 1);
      BarrierInit(EmptyW(i), kConsumers * 4);
    }
    FenceBarrierInit();
  }
};

// A place in a ring of `kCount`.
template <int32_t kCount>
struct Place {
  int32_t at = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void Advance() {
    if (++at == kCount) {
      at = 0;
      phase ^= 1;
    }
  }
};

// Tiles of a cluster: those of one row of tiles side by side, so that their weights come from the
// L2.
template <typename S>
struct Work {
  int32_t tile, stride;
  int32_t rank;  // of the block in its cluster
  __device__ __forceinline__ Work() {
    rank = static_cast<int32_t>(blockIdx.x) % S::kBlocks;
    tile = static_cast<int32_t>(blockIdx.x) / S::kBlocks;
    stride = static_cast<int32_t>(gridDim.x) / S::kBlocks;
  }
};

// The row tile of a warpgroup's warp. What SiLU leaves for the next product lies in chunks of
// columns of four row tiles (gpu_x.h): a warpgroup then takes such four.
template <typename S>
__device__ __forceinline__ int32_t RowTile(const KernelParams& k, int32_t tile, int32_t rank,
                                           int32_t warpgroup, int32_t warp) {
  const int32_t first = tile / k.token_tiles * S::kClusterRowTiles;
  const int32_t quarter = rank * kConsumers + warpgroup;
  if (k.input.next_ordered == nullptr || k.p.output != DecodeOutput::kSiluMul) {
    return first + quarter * 4 + warp;
  }
  const int32_t apart = k.input.next_group == 0 ? 4 : k.input.next_group / 32;
  return first + quarter / apart * apart * 4 + quarter % apart + warp * apart;
}

// One lane: this block's part of the tokens' activations, for all blocks.
template <typename S>
__device__ __forceinline__ void ProduceX(const KernelParams& k, uint8_t* shared) {
  const Work<S> work;
  const Barriers<S> bars(shared);
  WaitForPreviousKernel();
  LetNextKernelStart();
  constexpr int32_t kPartTokens = kTokens / S::kBlocks, kPartBytes = kHalfBytes / S::kBlocks;
  constexpr uint16_t kAllBlocks = (1 << S::kBlocks) - 1;
  Place<kStagesX> place;
  const int64_t half_halves = int64_t{64} * k.ordered_tokens;
  for (int32_t tile = work.tile; tile < k.tiles; tile += work.stride) {
    const int32_t token = tile % k.token_tiles * kTokens + work.rank * kPartTokens;
    const Real16* from = k.input.ordered + int64_t{64} * token;
    for (int32_t i = 0; i < 2 * k.slabs; ++i, from += half_halves, place.Advance()) {
      BarrierWait(bars.EmptyX(place.at), place.phase ^ 1);
      BarrierExpect(bars.FullX(place.at), kHalfBytes);
      BulkCopyToBlocks(shared + place.at * kHalfBytes + work.rank * kPartBytes, from, kPartBytes,
                       bars.FullX(place.at), kAllBlocks);
    }
  }
}

// One warp: a lane a row tile.
template <typename S>
__device__ __forceinline__ void ProduceW(const KernelParams& k, uint8_t* shared, int32_t lane) {
  const Work<S> work;
  const Barriers<S> bars(shared);
  const uint64_t policy = EvictNormalPolicy();
  Place<S::kStagesW> place;
  for (int32_t tile = work.tile; tile < k.tiles; tile += work.stride) {
    const int32_t row_tile =
        min(RowTile<S>(k, tile, work.rank, lane / 4 % kConsumers, lane % 4), k.row_tiles - 1);
    const uint8_t* from = k.p.slabs + static_cast<int64_t>(row_tile) * k.slabs * S::kSlabBytes;
    for (int32_t i = 0; i < k.slabs; ++i, from += S::kSlabBytes, place.Advance()) {
      BarrierWait(bars.EmptyW(place.at), place.phase ^ 1);
      if (lane == 0) BarrierExpect(bars.FullW(place.at), S::kStageW);
      __syncwarp();
      if (lane < kRowTiles) {
        BulkCopy(shared + S::kWeights + place.at * S::kStageW + lane * S::kSlabBytes, from,
                 S::kSlabBytes, bars.FullW(place.at), policy);
      }
    }
  }
}

// What one warp takes of a slab: 16 rows.
template <typename S>
struct SlabWords {
  uint4 words[2];
  half2 scales[S::kGroups];
  uint16_t zeros[S::kGroups];

  __device__ __forceinline__ void Load(const uint8_t* slab, int32_t lane) {
    words[0] = LoadShared128(slab + lane * 16);
    words[1] = LoadShared128(slab + 512 + lane * 16);
#pragma unroll
    for (int32_t group = 0; group < S::kGroups; ++group) {
      const uint8_t* constants =
          slab + layout::kGpuSlabNibbleBytes + group * layout::kGpuGroupBytes;
      scales[group] = *reinterpret_cast<const half2*>(constants + lane / 4 * 4);
      zeros[group] = *reinterpret_cast<const uint16_t*>(constants + 32 + lane / 4 * 2);
    }
  }
};

// Addresses and places are reckoned from what all lanes of a warp know to be the same.
template <typename S>
struct Consumer {
  static constexpr bool kOneRing = S::kStagesW == kSlabsX;  // both rings turn together
  const KernelParams& k;
  uint8_t* shared;
  Work<S> work;
  int32_t warpgroup, warp, lane;
  Place<kSlabsX> x;  // counts slabs
  Place<S::kStagesW> w;
  uint32_t full_x, full_w;  // the first barriers
  uint64_t rows;            // the first half of a slab's tokens
  const uint8_t* weights;   // of this warp in the first stage
  // The first barrier at which a lane gives back what was read: a lane a block for tokens, the next
  // one for weights.
  uint32_t empty;
  float acc[kTokens / 2];
  uint32_t a[2][4][4];  // k-steps of a half

  __device__ __forceinline__ Consumer(const KernelParams& params, uint8_t* memory, int32_t group)
      : k(params), shared(memory), warpgroup(group) {
    warp = __shfl_sync(0xffffffffu, static_cast<int32_t>(threadIdx.x) / 32 % 4, 0);
    lane = static_cast<int32_t>(threadIdx.x) % 32;
    const uint32_t base = __shfl_sync(0xffffffffu, SharedAddress(memory), 0);
    full_x = base + S::kBarriers;
    full_w = full_x + 2 * kStagesX * 8;
    rows = SwizzledRows(base);
    weights = memory + S::kWeights + (warpgroup * 4 + warp) * S::kSlabBytes;
    const bool gives_weights = lane == S::kBlocks;
    empty = AddressAt(gives_weights ? full_w + S::kStagesW * 8 : full_x + kStagesX * 8,
                      gives_weights ? work.rank : lane % S::kBlocks);
  }

  [[nodiscard]] __device__ __forceinline__ int32_t StageW() const { return kOneRing ? x.at : w.at; }
  [[nodiscard]] __device__ __forceinline__ uint32_t PhaseW() const {
    return kOneRing ? x.phase : w.phase;
  }

  // What the half before read is given back once its products have ended; and, from the second
  // half on, the slab's weights, which are in registers by then.
  template <int32_t kHalf>
  __device__ __forceinline__ void MultiplyHalf(const SlabWords<S>& words, bool first,
                                               GroupConstants* constants) {
    constexpr int32_t kStepsOfGroup = S::kGroup / 16;
    const int32_t half = x.at * 2 + kHalf;
    const uint64_t b = Further(rows, half * kHalfBytes);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t step = kHalf * 4 + i;
      if (step % kStepsOfGroup == 0) {
        *constants =
            MakeConstants(words.scales[step / kStepsOfGroup], words.zeros[step / kStepsOfGroup]);
      }
      Widen(Word(words.words[kHalf], i), *constants, a[kHalf][i]);
    }
    BarrierWait(full_x + half * 8, x.phase);
    WarpgroupFence();
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      WarpgroupMma<kTokens>::Add(acc, a[kHalf][i], Further(b, i * 32));
    }
    WarpgroupCommit();
    WarpgroupWait<1>();
    if constexpr (kHalf == 0) {
      const int32_t before = x.at == 0 ? kStagesX - 1 : half - 1;
      ArriveIf(!first && lane < S::kBlocks, empty + before * 8);
    } else {
      ArriveIf(lane <= S::kBlocks, empty + (lane == S::kBlocks ? StageW() : half - 1) * 8);
    }
  }

  __device__ __forceinline__ void MultiplyTile() {
#pragma unroll
    for (float& value : acc) value = 0;
    PinRegisters(acc);
    for (int32_t slab = 0; slab < k.slabs; ++slab) {
      BarrierWait(full_w + StageW() * 8, PhaseW());
      SlabWords<S> words;
      words.Load(weights + StageW() * S::kStageW, lane);
      GroupConstants constants;
      MultiplyHalf<0>(words, slab == 0, &constants);
      MultiplyHalf<1>(words, false, &constants);
      x.Advance();
      if constexpr (!kOneRing) w.Advance();
    }
    WarpgroupWait<0>();
    PinRegisters(acc);
    ArriveIf(lane < S::kBlocks, empty + ((x.at == 0 ? kSlabsX : x.at) * 2 - 1) * 8);
  }

  __device__ __forceinline__ void Meet() const {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + warpgroup), "n"(kGroupThreads) : "memory");
  }
  [[nodiscard]] __device__ __forceinline__ uint8_t* Staged() const {
    return shared + S::kStaged + warpgroup * kStagedBytes;
  }

  // SiLU(gate) * up as the next product's input, 64 tokens at a time. In the shared memory: of each
  // warp a plane, [token] of 8 columns; a plane's pairs are every fourth of a chunk.
  __device__ __forceinline__ void StoreOrdered(int32_t row_tile, int32_t first_token) const {
    const int32_t thread = warp * 32 + lane;
    const float2 bias = RowBiases(k.p, row_tile * 16 + lane / 4);
    uint8_t* staged = Staged();
    // The chunk that this thread writes: of the first warp's row tile.
    const int32_t apart = k.input.next_group == 0 ? 4 : k.input.next_group / 32;
    const int32_t column = (row_tile - warp * apart) * 8 + thread % 4 * 2;
    if (column >= k.p.rows / 2) return;  // the whole warpgroup
    Real16* to = k.input.next_ordered + layout::GpuOrderedIndex(first_token + thread / 4, column,
                                                                apart * 32, k.ordered_tokens);
#pragma unroll
    for (int32_t pass = 0; pass < kTokens / 64; ++pass) {
      uint32_t pairs[8];
#pragma unroll
      for (int32_t eight = 0; eight < 8; ++eight) {
        const float* v = acc + (pass * 8 + eight) * 4;
        pairs[eight] = RealBits(SiluTimes(v[0] + bias.x, v[2] + bias.y),
                                SiluTimes(v[1] + bias.x, v[3] + bias.y));
      }
      Meet();
#pragma unroll
      for (int32_t eight = 0; eight < 8; ++eight) {
        *reinterpret_cast<uint32_t*>(staged + warp * 1024 + eight * 128 + lane * 4) =
            Transposed(pairs[eight]);
      }
      Meet();
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        const auto* from = reinterpret_cast<const uint32_t*>(staged) + i * 128 + thread;
        const uint4 chunk = make_uint4(from[0], from[256], from[512], from[768]);
        const int32_t in_tile = pass * 64 + i * 32;
        if (first_token + in_tile + thread / 4 < k.p.tokens) {
          *reinterpret_cast<uint4*>(to + in_tile * 64) = chunk;
        }
      }
    }
  }

  // [tokens, rows] of fp16, 32 tokens at a time: of each 128 bytes, in chunks swizzled by the
  // token.
  __device__ __forceinline__ void StoreHalfRows(int32_t row_tile, int32_t first_token) const {
    const int32_t thread = warp * 32 + lane;
    const float2 bias = RowBiases(k.p, row_tile * 16 + lane / 4);
    uint8_t* staged = Staged();
    const int32_t row = (row_tile - warp) * 16 + thread % 8 * 8;
    const int32_t swizzled = (thread % 8 ^ thread / 8 % 8) * 16;
    Real16* to = k.p.y_half + static_cast<int64_t>(first_token + thread / 8) * k.p.rows + row;
#pragma unroll
    for (int32_t pass = 0; pass < kTokens / 32; ++pass) {
      Meet();
#pragma unroll
      for (int32_t eight = 0; eight < 4; ++eight) {
        const float* v = acc + (pass * 4 + eight) * 4;
        const uint32_t upper = Transposed(RealBits(v[0] + bias.x, v[1] + bias.x));
        const uint32_t lower = Transposed(RealBits(v[2] + bias.y, v[3] + bias.y));
        uint8_t* at = staged + (eight * 8 + lane / 4) * 128 + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(at + (2 * warp ^ lane / 4) * 16) = upper;
        *reinterpret_cast<uint32_t*>(at + (2 * warp + 1 ^ lane / 4) * 16) = lower;
      }
      Meet();
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        const int32_t in_tile = pass * 32 + i * 16;
        const uint4 chunk = LoadShared128(staged + (i * 16 + thread / 8) * 128 + swizzled);
        if (first_token + in_tile + thread / 8 < k.p.tokens && row < k.p.rows) {
          *reinterpret_cast<uint4*>(to + static_cast<int64_t>(in_tile) * k.p.rows) = chunk;
        }
      }
    }
  }

  // [tokens, rows] of fp32, written or added, 16 tokens at a time: of each 256 bytes, in chunks
  // that two tokens and the next two hold differently.
  __device__ __forceinline__ void StoreFloatRows(int32_t row_tile, int32_t first_token) const {
    const int32_t thread = warp * 32 + lane;
    const bool add = k.p.output == DecodeOutput::kAddResidual;
    const float2 bias = RowBiases(k.p, row_tile * 16 + lane / 4);
    uint8_t* staged = Staged();
    const int32_t row = (row_tile - warp) * 16 + thread % 16 * 4;
    const int32_t swizzled = (thread % 16 ^ thread / 32 % 4 * 2) * 16;
    float* to = (add ? k.p.residual_out : k.p.y_float) +
                static_cast<int64_t>(first_token + thread / 16) * k.p.rows + row;
#pragma unroll
    for (int32_t pass = 0; pass < kTokens / 16; ++pass) {
      Meet();
#pragma unroll
      for (int32_t i = 0; i < 8; ++i) {
        const int32_t token = i / 4 * 8 + lane % 4 * 2 + i % 2;
        const int32_t in_group = warp * 16 + i / 2 % 2 * 8 + lane / 4;
        const int32_t chunk = in_group / 4 ^ lane % 4 * 2;
        *reinterpret_cast<float*>(staged + token * 256 + chunk * 16 + in_group % 4 * 4) =
            acc[pass * 8 + i] + (i / 2 % 2 == 0 ? bias.x : bias.y);
      }
      Meet();
#pragma unroll
      for (int32_t i = 0; i < 2; ++i) {
        const int32_t in_tile = pass * 16 + i * 8;
        const auto four =
            *reinterpret_cast<const float4*>(staged + (i * 8 + thread / 16) * 256 + swizzled);
        if (first_token + in_tile + thread / 16 >= k.p.tokens || row >= k.p.rows) continue;
        float* at = to + static_cast<int64_t>(in_tile) * k.p.rows;
        if (add) {
          AddFour(at, four);
        } else {
          *reinterpret_cast<float4*>(at) = four;
        }
      }
    }
  }

  __device__ __forceinline__ void Store(int32_t tile) const {
    const int32_t row_tile = RowTile<S>(k, tile, work.rank, warpgroup, warp);
    const int32_t first_token = tile % k.token_tiles * kTokens;
    const bool silu = k.p.output == DecodeOutput::kSiluMul;
    if (silu && k.input.next_ordered != nullptr) {
      StoreOrdered(row_tile, first_token);
    } else if (k.staged && k.p.output == DecodeOutput::kHalf) {
      StoreHalfRows(row_tile, first_token);
    } else if (k.staged && !silu) {
      StoreFloatRows(row_tile, first_token);
    } else if (row_tile < k.row_tiles) {
      StoreRowTile(k.p, {nullptr, 0, 0}, {row_tile, first_token, lane}, acc);
    }
  }

  __device__ __forceinline__ void Run() {
    WaitForPreviousKernel();
    for (int32_t tile = work.tile; tile < k.tiles; tile += work.stride) {
      MultiplyTile();
      Store(tile);
    }
  }
};

template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    W4PromptKernel(const __grid_constant__ KernelParams k) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  if (threadIdx.x == 0) Barriers<S>(shared).Init();
  __syncthreads();
  ArriveCluster();
  WaitForCluster();
  const int32_t group = static_cast<int32_t>(threadIdx.x) / kGroupThreads;
  if (group == kConsumers) {
    GiveRegisters<kProducerRegisters>();
    const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32 % 4;
    const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
    if (warp == 0 && lane == 0) ProduceX<S>(k, shared);
    if (warp == 1) ProduceW<S>(k, shared, lane);
    __syncwarp();
  } else {
    TakeRegisters<kConsumerRegisters>();
    Consumer<S>(k, shared, group).Run();
  }
  // Another block may still arrive here, or copy.
  ArriveCluster();
  WaitForCluster();
#endif
}

template <typename S>
LaunchShape ShapeOf(int32_t clusters, const LaunchOptions& options) {
  return {.grid = dim3(static_cast<uint32_t>(clusters * S::kBlocks)),
          .block = dim3(kThreads),
          .shared_bytes = S::kBytes,
          .stream = options.stream,
          .dependent = options.dependent,
          .cluster = S::kBlocks};
}

template <typename S>
int32_t Tiles(const W4BatchParams& params) {
  return (layout::GpuRowTiles(params.rows) + S::kClusterRowTiles - 1) / S::kClusterRowTiles *
         (layout::GpuOrderedTokens(params.tokens) / kTokens);
}

// Clusters that the device runs at a time.
template <typename S>
cudaError_t Prepare(int32_t multiprocessors, int32_t* clusters) {
  const cudaError_t error = cudaFuncSetAttribute(
      W4PromptKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  *clusters = multiprocessors / S::kBlocks;
  if (error != cudaSuccess || S::kBlocks == 2) return error;
  return CountClusters(W4PromptKernel<S>, ShapeOf<S>(*clusters, {}), clusters);
}

template <typename S>
cudaError_t Launch(const W4BatchParams& params, const WgmmaInput& input, int32_t clusters,
                   const LaunchOptions& options) {
  KernelParams k{.p = params, .input = input};
  k.ordered_tokens = layout::GpuOrderedTokens(params.tokens);
  k.token_tiles = k.ordered_tokens / kTokens;
  k.row_tiles = layout::GpuRowTiles(params.rows);
  k.tiles = Tiles<S>(params);
  k.slabs = layout::GpuSlabs(params.columns);
  k.staged = params.rows % 8 == 0;
  return LaunchKernel(W4PromptKernel<S>, ShapeOf<S>(std::min(k.tiles, clusters), options), k);
}

// Four blocks a cluster bring half as many activations from the L2 and use less power, but leave
// some multiprocessors idle, which no four of a cluster fit: they may take an eleventh more rounds.
template <int32_t kGroup>
cudaError_t LaunchGroup(const W4BatchParams& params, const WgmmaInput& input,
                        int32_t multiprocessors, const LaunchOptions& options) {
  using Pairs = Shape<kGroup, 2>;
  using Fours = Shape<kGroup, 4>;
  int32_t pairs = 0, fours = 0;
  cudaError_t error = Prepare<Pairs>(multiprocessors, &pairs);
  if (error == cudaSuccess) error = Prepare<Fours>(multiprocessors, &fours);
  if (error != cudaSuccess) return error;
  const auto rounds = [](int32_t tiles, int32_t clusters) {
    return (tiles + clusters - 1) / clusters;
  };
  if (fours > 0 &&
      11 * rounds(Tiles<Fours>(params), fours) <= 12 * rounds(Tiles<Pairs>(params), pairs)) {
    return Launch<Fours>(params, input, fours, options);
  }
  return Launch<Pairs>(params, input, pairs, options);
}

}  // namespace

cudaError_t W4WgmmaPrompt(const W4BatchParams& params, const WgmmaInput& input,
                          int32_t multiprocessors, const LaunchOptions& options) {
  switch (params.group) {
    case 32:
      return LaunchGroup<32>(params, input, multiprocessors, options);
    case 64:
      return LaunchGroup<64>(params, input, multiprocessors, options);
    case 128:
      return LaunchGroup<128>(params, input, multiprocessors, options);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
