// Products of prompts. Two blocks of a cluster compute 256 rows of 256 tokens: each brings half of
// the tokens into both blocks' shared memory, and the weights of its own 128 rows. Two warpgroups
// of 64 rows each widen weights in registers and multiply. The second runs a little behind the
// first, so that one has the tensor cores while the other stores its results.
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
constexpr int32_t kBlocks = 2;                             // of a cluster
constexpr int32_t kRowTiles = 8;                           // of a block
constexpr int32_t kClusterRowTiles = kBlocks * kRowTiles;  // 128 columns of SiLU's results
constexpr int32_t kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int32_t kHalfBytes = kTokens * 128;  // 64 k of the tile's tokens
constexpr int32_t kStagesX = 6;
constexpr int32_t kStagedBytes = 4096;  // results of a warpgroup on their way out
constexpr uint16_t kBothBlocks = 3;

struct KernelParams {
  W4BatchParams p;
  WgmmaInput input;
  int32_t ordered_tokens;
  int32_t token_tiles;
  int32_t tiles;  // of a cluster
  int32_t slabs;  // along k
  bool staged;    // results lie so that 16 bytes go out at a time
};

template <int32_t kGroupT>
struct Shape {
  static constexpr int32_t kGroup = kGroupT;
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
      BarrierInit(EmptyX(i), kBlocks * kConsumers * 4);  // the warps of both blocks
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
struct Work {
  int32_t tile, stride;
  int32_t rank;  // of the block in its cluster
  __device__ __forceinline__ Work() {
    rank = static_cast<int32_t>(blockIdx.x) % kBlocks;
    tile = static_cast<int32_t>(blockIdx.x) / kBlocks;
    stride = static_cast<int32_t>(gridDim.x) / kBlocks;
  }
};

// The row tile of a warpgroup's warp. What SiLU leaves for the next product lies in chunks of
// columns of four row tiles (gpu_x.h): a warpgroup then takes such four.
__device__ __forceinline__ int32_t RowTile(const KernelParams& k, int32_t tile, int32_t rank,
                                           int32_t warpgroup, int32_t warp) {
  const int32_t first = tile / k.token_tiles * kClusterRowTiles;
  const int32_t quarter = rank * kConsumers + warpgroup;
  if (k.input.next_ordered == nullptr || k.p.output != DecodeOutput::kSiluMul) {
    return first + quarter * 4 + warp;
  }
  const int32_t apart = k.input.next_group == 0 ? 4 : k.input.next_group / 32;
  return first + quarter / apart * apart * 4 + quarter % apart + warp * apart;
}

// One lane: both blocks' halves of the tokens' activations.
template <typename S>
__device__ __forceinline__ void ProduceX(const KernelParams& k, uint8_t* shared) {
  const Work work;
  const Barriers<S> bars(shared);
  WaitForPreviousKernel();
  LetNextKernelStart();
  Place<kStagesX> place;
  const int64_t half_halves = int64_t{64} * k.ordered_tokens;
  for (int32_t tile = work.tile; tile < k.tiles; tile += work.stride) {
    const int32_t token = tile % k.token_tiles * kTokens + work.rank * (kTokens / kBlocks);
    const Real16* from = k.input.ordered + int64_t{64} * token;
    for (int32_t i = 0; i < 2 * k.slabs; ++i, from += half_halves, place.Advance()) {
      BarrierWait(bars.EmptyX(place.at), place.phase ^ 1);
      BarrierExpect(bars.FullX(place.at), kHalfBytes);
      BulkCopyToBlocks(shared + place.at * kHalfBytes + work.rank * (kHalfBytes / kBlocks), from,
                       kHalfBytes / kBlocks, bars.FullX(place.at), kBothBlocks);
    }
  }
}

// One warp: a lane a row tile.
template <typename S>
__device__ __forceinline__ void ProduceW(const KernelParams& k, uint8_t* shared, int32_t lane) {
  const Work work;
  const Barriers<S> bars(shared);
  const uint64_t policy = EvictNormalPolicy();
  Place<S::kStagesW> place;
  for (int32_t tile = work.tile; tile < k.tiles; tile += work.stride) {
    const int32_t row_tile = min(RowTile(k, tile, work.rank, lane / 4 % kConsumers, lane % 4),
                                 layout::GpuRowTiles(k.p.rows) - 1);
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

template <typename S>
struct Consumer {
  static constexpr int32_t kSteps = 2;  // k-steps committed at a time
  const KernelParams& k;
  uint8_t* shared;
  Barriers<S> bars;
  Work work;
  int32_t warpgroup, warp, lane;
  Place<kStagesX> x;
  Place<S::kStagesW> w;
  uint64_t* read_x = nullptr;  // of what was multiplied before; nullptr: nothing
  uint64_t* read_w = nullptr;
  float acc[kTokens / 2];
  uint32_t a[2][kSteps][4];

  __device__ __forceinline__ Consumer(const KernelParams& params, uint8_t* memory, int32_t group)
      : k(params), shared(memory), bars(memory), warpgroup(group) {
    warp = static_cast<int32_t>(threadIdx.x) / 32 % 4;
    lane = static_cast<int32_t>(threadIdx.x) % 32;
  }

  // What the products that have ended read may be written again.
  __device__ __forceinline__ void Free() {
    if (lane == 0 && read_x != nullptr) {
      BarrierArriveAt(read_x, 0);
      BarrierArriveAt(read_x, 1);
      if (read_w != nullptr) BarrierArrive(read_w);
    }
    read_x = nullptr;
    read_w = nullptr;
  }

  __device__ __forceinline__ void MultiplyHalf(const SlabWords<S>& words, int32_t half_index,
                                               GroupConstants* constants) {
    constexpr int32_t kStepsOfGroup = S::kGroup / 16;
    BarrierWait(bars.FullX(x.at), x.phase);
    const uint64_t b = SwizzledRows(SharedAddress(shared + x.at * kHalfBytes));
#pragma unroll
    for (int32_t set = 0; set < 2; ++set) {
#pragma unroll
      for (int32_t i = 0; i < kSteps; ++i) {
        const int32_t step = half_index * 4 + set * kSteps + i;
        if (step % kStepsOfGroup == 0) {
          *constants =
              MakeConstants(words.scales[step / kStepsOfGroup], words.zeros[step / kStepsOfGroup]);
        }
        Widen(Word(words.words[half_index], step % 4), *constants, a[set][i]);
      }
      WarpgroupFence();
#pragma unroll
      for (int32_t i = 0; i < kSteps; ++i) {
        WarpgroupMma<kTokens>::Add(acc, a[set][i], Further(b, (set * kSteps + i) * 32));
      }
      WarpgroupCommit();
      WarpgroupWait<1>();
      if (set == 0) Free();
    }
    read_x = bars.EmptyX(x.at);
    x.Advance();
  }

  __device__ __forceinline__ void MultiplyTile() {
#pragma unroll
    for (float& value : acc) value = 0;
    PinRegisters(acc);
    for (int32_t slab = 0; slab < k.slabs; ++slab) {
      BarrierWait(bars.FullW(w.at), w.phase);
      SlabWords<S> words;
      words.Load(shared + S::kWeights + w.at * S::kStageW + (warpgroup * 4 + warp) * S::kSlabBytes,
                 lane);
      GroupConstants constants;
      MultiplyHalf(words, 0, &constants);
      MultiplyHalf(words, 1, &constants);
      read_w = bars.EmptyW(w.at);
      w.Advance();
    }
    WarpgroupWait<0>();
    PinRegisters(acc);
    Free();
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
    const int32_t row_tile = RowTile(k, tile, work.rank, warpgroup, warp);
    const int32_t first_token = tile % k.token_tiles * kTokens;
    const bool silu = k.p.output == DecodeOutput::kSiluMul;
    if (silu && k.input.next_ordered != nullptr) {
      StoreOrdered(row_tile, first_token);
    } else if (k.staged && k.p.output == DecodeOutput::kHalf) {
      StoreHalfRows(row_tile, first_token);
    } else if (k.staged && !silu) {
      StoreFloatRows(row_tile, first_token);
    } else if (row_tile < layout::GpuRowTiles(k.p.rows)) {
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
  // The other block may still arrive here, or copy.
  ArriveCluster();
  WaitForCluster();
#endif
}

template <typename S>
cudaError_t Launch(const W4BatchParams& params, const WgmmaInput& input, int32_t multiprocessors,
                   const LaunchOptions& options) {
  const cudaError_t error = cudaFuncSetAttribute(
      W4PromptKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (error != cudaSuccess) return error;
  KernelParams k{.p = params, .input = input};
  k.ordered_tokens = layout::GpuOrderedTokens(params.tokens);
  k.token_tiles = k.ordered_tokens / kTokens;
  k.tiles =
      (layout::GpuRowTiles(params.rows) + kClusterRowTiles - 1) / kClusterRowTiles * k.token_tiles;
  k.slabs = layout::GpuSlabs(params.columns);
  k.staged = params.rows % 8 == 0;
  const int32_t clusters = std::min(k.tiles, multiprocessors / kBlocks);
  return LaunchKernel(W4PromptKernel<S>,
                      {.grid = dim3(static_cast<uint32_t>(clusters * kBlocks)),
                       .block = dim3(kThreads),
                       .shared_bytes = S::kBytes,
                       .stream = options.stream,
                       .dependent = options.dependent,
                       .cluster = kBlocks},
                      k);
}

}  // namespace

cudaError_t W4WgmmaPrompt(const W4BatchParams& params, const WgmmaInput& input,
                          int32_t multiprocessors, const LaunchOptions& options) {
  switch (params.group) {
    case 32:
      return Launch<Shape<32>>(params, input, multiprocessors, options);
    case 64:
      return Launch<Shape<64>>(params, input, multiprocessors, options);
    case 128:
      return Launch<Shape<128>>(params, input, multiprocessors, options);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
