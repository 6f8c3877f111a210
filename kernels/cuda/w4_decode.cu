#include "kernels/cuda/w4_decode.h"

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/w4_decode_stream.cuh"

namespace nibble::cuda {
namespace {

using namespace decode;

// More than half of a multiprocessor's shared memory. Two blocks of one launch on a multiprocessor
// would leave another without any, and the launch would take twice as long.
constexpr int32_t kExclusiveBytes = 118 * 1024;

// A warp's part of a token's sum of squares, all loads in flight at once.
__device__ __forceinline__ float LoadSquares(const NormedInput& normed, int32_t token,
                                             int32_t lane) {
  const float* parts = normed.square_sums + static_cast<int64_t>(token) * normed.parts;
  float sum = 0;
#pragma unroll 8
  for (int32_t i = lane; i < normed.parts; i += 32) sum += parts[i];
  return sum;
}

// Every warp sees to its tokens: what the results of a normed input are multiplied by.
struct TokenFactors {
  float squares[2];
  float scale[2];

  __device__ __forceinline__ void Load(const W4DecodeParams& p, int32_t warp, int32_t lane) {
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t token = warp + i * kWarps;
      if (token >= p.tokens) continue;
      squares[i] = LoadSquares(p.normed, token, lane);
      scale[i] = p.normed.scale[token];
    }
  }
  __device__ __forceinline__ void Store(const W4DecodeParams& p, int32_t warp, int32_t lane,
                                        float* factors) const {
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t token = warp + i * kWarps;
      if (token >= p.tokens) continue;
      float sum = squares[i];
#pragma unroll
      for (int32_t offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      }
      const float inverse = rsqrtf(sum / static_cast<float>(p.columns) + p.normed.epsilon);
      if (lane != 0) continue;
      factors[token] = inverse / (scale[i] * kNormedInputFactor);
      if (blockIdx.x == 0) p.normed.inverse_rms_out[token] = inverse;
    }
  }
};

// Partial sums of row tiles in shared memory. The block collects a round of tiles, meets, and a
// few of its warps, others each time, finish the round while the rest go on: one thread for rows
// r, r + 8 of one token. Two buffers take turns, so one meeting a round is enough.
struct Rounds {
  float4* data;
  int32_t columns;  // pairs of tokens
  int32_t tiles;    // of a round

  // A warp's results of a tile: [pair of tokens][row] of rows r, r + 8 of both tokens.
  __device__ __forceinline__ float4* At(int32_t buffer, int32_t tile, int32_t warp) const {
    return data + ((buffer * tiles + tile) * kWarps + warp) * columns * 8;
  }
  template <typename S>
  __device__ __forceinline__ void Put(int32_t round, int32_t tile, int32_t warp, int32_t lane,
                                      const float (&acc)[S::kTokenTiles][4]) const {
    float4* to = At(round % 2, tile, warp) + lane / 4;
#pragma unroll
    for (int32_t t = 0; t < S::kTokenTiles; ++t) {
      const int32_t column = t * 4 + lane % 4;
      if (column < columns) {
        to[column * 8] = make_float4(acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
      }
    }
  }
};

// What one thread finishes: rows r, r + 8 of a row tile, for one token.
struct Item {
  bool exists = false;
  int32_t tile = 0;  // of the round
  int32_t row_tile = 0;
  int32_t r = 0;
  int32_t token = 0;
  float old[2];
  float weight[2];

  // Old residuals and norm weights, asked for while the tiles are still being multiplied.
  __device__ __forceinline__ void Prefetch(const W4DecodeParams& p) {
    if (!exists || p.output != DecodeOutput::kAddResidual) return;
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      const int32_t row = row_tile * layout::kGpuTileRows + r + 8 * i;
      const bool real = row < p.rows;
      old[i] = real ? p.residual_out[static_cast<int64_t>(token) * p.rows + row] : 0;
      weight[i] = real && p.next.x != nullptr ? __half2float(p.next.norm_weight[row]) : 0;
    }
  }
};

// One value of a finished row and token. Returns its square where the next norm asks for it.
__device__ __forceinline__ float StoreValue(const W4DecodeParams& p, const Item& item, int32_t i,
                                            float value, float scale) {
  const int32_t row = item.row_tile * layout::kGpuTileRows + item.r + 8 * i;
  if (!item.exists || row >= p.rows) return 0;
  const int64_t at = static_cast<int64_t>(item.token) * p.rows + row;
  if (p.output == DecodeOutput::kHalf) {
    p.y_half[at] = __float2half(value);
    return 0;
  }
  if (p.output == DecodeOutput::kFloat) {
    p.y_float[at] = value;
    return 0;
  }
  value += item.old[i];
  p.residual_out[at] = value;
  if (p.next.x != nullptr) p.next.x[at] = __float2half(value * item.weight[i] * scale);
  return value * value;
}

// Called by whole warps; eight lanes side by side hold the rows of one token.
__device__ __forceinline__ void StoreItem(const W4DecodeParams& p, const Item& item, float low,
                                          float high, const float* factors, const float* scales) {
  const int32_t row = item.row_tile * layout::kGpuTileRows + item.r;
  const float factor = factors[item.token];
  low *= factor;
  high *= factor;
  if (p.bias != nullptr) {
    if (row < p.rows) low += __half2float(p.bias[row]);
    if (row + 8 < p.rows) high += __half2float(p.bias[row + 8]);
  }
  if (p.output == DecodeOutput::kSiluMul) {
    const int32_t column = item.row_tile * 8 + item.r;
    if (item.exists && column < p.rows / 2) {
      p.y_half[static_cast<int64_t>(item.token) * (p.rows / 2) + column] =
          __float2half(low / (1.0f + __expf(-low)) * high);
    }
    return;
  }
  const float scale = scales[item.token];
  float squares = StoreValue(p, item, 0, low, scale) + StoreValue(p, item, 1, high, scale);
  if (p.output != DecodeOutput::kAddResidual || p.next.x == nullptr) return;
#pragma unroll
  for (int32_t offset = 1; offset < 8; offset *= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  if (item.exists && item.r == 0) {
    p.next.square_sums[item.token * layout::GpuRowTiles(p.rows) + item.row_tile] = squares;
  }
}

template <typename S>
struct SharedLayout {
  static constexpr int32_t kBufferBytes = kWarps * S::kTokenTiles * 32 * 16;  // of a round
  static constexpr int32_t kRing = kWarps * S::kSlots * S::kSlotBytes;
  static constexpr int32_t kBars = kRing + 2 * kBufferBytes;
  static constexpr int32_t kFactors = kBars + kWarps * S::kSlots * 8;
  static constexpr int32_t kScales = kFactors + 16 * 4;
  static constexpr int32_t kLast = kScales + 16 * 4;  // a byte for each of kThreads tiles
  static constexpr int32_t kSums = kLast + kThreads;
  static constexpr int32_t kBytes = kSums + kWarps * Fragments<S>::kSumBytes;
};

// Where this block stands in a grid that may split rows.
struct Place {
  int32_t part, parts;
  int32_t first_tile, tile_stride, tile_count;
  __device__ __forceinline__ int32_t RowTile(int32_t tile) const {
    return first_tile + tile * tile_stride;
  }
};
__device__ __forceinline__ Place MakePlace(const W4DecodeParams& p, int32_t parts) {
  Place place;
  place.parts = parts;
  place.part = static_cast<int32_t>(blockIdx.x) % parts;
  place.tile_stride = static_cast<int32_t>(gridDim.x) / parts;
  place.first_tile = static_cast<int32_t>(blockIdx.x) / parts;
  place.tile_count =
      (layout::GpuRowTiles(p.rows) - place.first_tile + place.tile_stride - 1) / place.tile_stride;
  return place;
}

// What thread `index` of the finishing ones does in a round that begins at tile `first`.
__device__ __forceinline__ Item MakeItem(const W4DecodeParams& p, const Place& place,
                                         const Rounds& rounds, int32_t index, int32_t first) {
  Item item;
  const int32_t tokens = 2 * rounds.columns;
  item.r = index % 8;
  item.token = index / 8 % tokens;
  item.tile = index / 8 / tokens;
  item.exists = item.tile < min(rounds.tiles, place.tile_count - first) && item.token < p.tokens;
  item.row_tile = item.exists ? place.RowTile(first + item.tile) : 0;
  return item;
}

// The place of an item's two sums in the memory where parts of rows meet.
__device__ __forceinline__ float2* SplitSums(const W4DecodeParams& p, const Place& place,
                                             const Item& item, int32_t part) {
  const int64_t tile = static_cast<int64_t>(item.row_tile) * place.parts + part;
  return reinterpret_cast<float2*>(p.split_sums) + (tile * p.tokens + item.token) * 8 + item.r;
}

// After a meeting: adds a round's sums up in warp order and stores them, or this part's share.
__device__ __forceinline__ void FinishRound(const W4DecodeParams& p, const Place& place,
                                            const Rounds& rounds, int32_t round, const Item& item,
                                            const float* factors, const float* scales) {
  float low = 0, high = 0;
  if (item.exists) {
    const float* from = reinterpret_cast<const float*>(rounds.At(round % 2, item.tile, 0)) +
                        (item.token / 2 * 8 + item.r) * 4 + item.token % 2;
#pragma unroll
    for (int32_t warp = 0; warp < kWarps; ++warp) {
      low += from[warp * rounds.columns * 32];
      high += from[warp * rounds.columns * 32 + 2];
    }
  }
  if (place.parts == 1) {
    StoreItem(p, item, low, high, factors, scales);
  } else if (item.exists) {
    *SplitSums(p, place, item, place.part) = make_float2(low, high);
  }
}

// The parts of the block's tiles are all on their way: whichever block comes last to a tile adds
// its parts up, in their order. Thread i counts tile i; all threads share what is to be finished.
__device__ void FinishSplit(const W4DecodeParams& p, const Place& place, const Rounds& rounds,
                            uint8_t* last, const float* factors, const float* scales) {
  const int32_t items = 16 * rounds.columns;  // of a tile
  for (int32_t first = 0; first < place.tile_count; first += kThreads) {
    const int32_t tile = first + static_cast<int32_t>(threadIdx.x);
    __threadfence();
    __syncthreads();
    if (tile < place.tile_count) {
      int32_t* arrivals = p.split_arrivals + place.RowTile(tile);
      last[threadIdx.x] = atomicAdd(arrivals, 1) == place.parts - 1;
      if (last[threadIdx.x] != 0) *arrivals = 0;
    }
    __syncthreads();
    __threadfence();
    const int32_t count = min(kThreads, place.tile_count - first);
    for (int32_t i = threadIdx.x; i < (count * items + 31) / 32 * 32; i += kThreads) {
      Item item;
      item.r = i % 8;
      item.token = i % items / 8;
      item.tile = i / items;
      item.exists = item.tile < count && item.token < p.tokens && last[item.tile] != 0;
      item.row_tile = item.exists ? place.RowTile(first + item.tile) : 0;
      if (__ballot_sync(0xffffffffu, item.exists) == 0) continue;
      item.Prefetch(p);
      float2 sum = make_float2(0, 0);
      for (int32_t part = 0; item.exists && part < place.parts; ++part) {
        const float2 other = __ldcg(SplitSums(p, place, item, part));
        sum.x += other.x;
        sum.y += other.y;
      }
      StoreItem(p, item, sum.x, sum.y, factors, scales);
    }
  }
}

template <typename S>
__device__ __forceinline__ void InitStream(const W4DecodeParams& p, const Place& place,
                                           const WarpRange& range, uint8_t* shared, int32_t warp,
                                           int32_t lane, WeightStream<S>* stream) {
  using Layout = SharedLayout<S>;
  const int32_t slabs = layout::GpuSlabs(p.columns);
  stream->ring = shared + warp * S::kSlots * S::kSlotBytes;
  stream->full = reinterpret_cast<uint64_t*>(shared + Layout::kBars) + warp * S::kSlots;
  stream->policy = EvictFirstPolicy();
  stream->next =
      p.slabs + (static_cast<int64_t>(place.first_tile) * slabs + range.begin) * S::kSlabBytes;
  stream->tile_stride = static_cast<int64_t>(place.tile_stride) * slabs * S::kSlabBytes;
  stream->slabs = range.end - range.begin;
  stream->tiles_left = place.tile_count;
  // Slabs that a warp lacks are never copied: they must hold finite numbers all the same.
  if (stream->slabs < S::kChunk) {
    for (int32_t i = lane; i < S::kSlots * S::kSlotBytes / 16; i += 32) {
      reinterpret_cast<uint4*>(stream->ring)[i] = make_uint4(0, 0, 0, 0);
    }
    FenceSharedForCopies();
  }
  __syncwarp();
  if (lane == 0) {
    for (int32_t i = 0; i < S::kSlots; ++i) BarrierInit(stream->full + i, 1);
    FenceBarrierInit();
    for (int32_t i = 0; i < S::kSlots; ++i) stream->Issue();
  }
}

// What results are multiplied by, and what the next input is: of every token, in shared memory.
template <typename S>
__device__ __forceinline__ void LoadInputs(const W4DecodeParams& p, const WarpRange& range,
                                           int32_t warp, int32_t lane, Fragments<S>* x,
                                           float* factors, float* scales) {
  TokenFactors token_factors;
  const bool normed = p.normed.scale != nullptr;
  if (normed) token_factors.Load(p, warp, lane);
  float next_scale = 0;
  if (warp == 0 && lane < p.tokens && p.next.x != nullptr) next_scale = p.next.scale[lane];
  LoadActivations<S>(p, range, lane, x);
  if (normed) {
    token_factors.Store(p, warp, lane, factors);
  } else if (warp == 0 && lane < 16) {
    factors[lane] = 1;
  }
  if (warp == 0 && lane < 16) scales[lane] = next_scale * kNormedInputFactor;
  SumGroups<S>(lane, x);
  __syncwarp();
}

template <typename S>
__global__ void __launch_bounds__(kThreads, S::kBlocksTogether)
    W4DecodeKernel(const __grid_constant__ W4DecodeParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  using Layout = SharedLayout<S>;
  const int32_t warp = threadIdx.x / 32;
  const int32_t lane = threadIdx.x % 32;
  const int32_t slab_count = layout::GpuSlabs(p.columns);
  const Place place = MakePlace(p, (slab_count + kWarps * S::kChunk - 1) / (kWarps * S::kChunk));
  const WarpRange range = SlabRange(slab_count, place.part * kWarps + warp, place.parts * kWarps);
  float* factors = reinterpret_cast<float*>(shared + Layout::kFactors);
  float* scales = reinterpret_cast<float*>(shared + Layout::kScales);
  Rounds rounds;
  rounds.data = reinterpret_cast<float4*>(shared + Layout::kRing);
  rounds.columns = (p.tokens + 1) / 2;
  rounds.tiles = Layout::kBufferBytes / (kWarps * rounds.columns * 128);
  WeightStream<S> stream;
  InitStream<S>(p, place, range, shared, warp, lane, &stream);
  WaitForPreviousKernel();
  LetNextKernelStart();

  Fragments<S> x;
  x.sums = reinterpret_cast<float*>(shared + Layout::kSums + warp * Fragments<S>::kSumBytes);
  LoadInputs<S>(p, range, warp, lane, &x, factors, scales);
  const int32_t finishers = (rounds.tiles * rounds.columns * 16 + 31) / 32;  // warps
  for (int32_t first = 0, round = 0; first < place.tile_count; first += rounds.tiles, ++round) {
    const int32_t turn = (warp + round * finishers) % kWarps;
    Item item = MakeItem(p, place, rounds, turn * 32 + lane, first);
    if (place.parts == 1) item.Prefetch(p);
    const int32_t tiles = min(rounds.tiles, place.tile_count - first);
    for (int32_t tile = 0; tile < tiles; ++tile) {
      float acc[S::kTokenTiles][4] = {};
      MultiplyTile<S>(&stream, lane, x, acc);
      rounds.Put<S>(round, tile, warp, lane, acc);
    }
    __syncthreads();
    if (turn < finishers) FinishRound(p, place, rounds, round, item, factors, scales);
  }
  if (place.parts > 1) {
    FinishSplit(p, place, rounds, shared + Layout::kLast, factors, scales);
  }
}

template <typename S>
cudaError_t LaunchShapeOf(const W4DecodeParams& params, const DecodeGrid& grid,
                          cudaStream_t stream) {
  constexpr int32_t kBytes =
      SharedLayout<S>::kBytes < kExclusiveBytes ? kExclusiveBytes : SharedLayout<S>::kBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(W4DecodeKernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  return LaunchKernel(W4DecodeKernel<S>,
                      {.grid = dim3(static_cast<uint32_t>(grid.blocks)),
                       .block = dim3(kThreads),
                       .shared_bytes = kBytes,
                       .stream = stream,
                       .dependent = params.dependent_launch},
                      params);
}

template <int32_t kGroup>
cudaError_t Launch(const W4DecodeParams& params, const DecodeGrid& grid, cudaStream_t stream) {
  if (params.tokens <= 8) return LaunchShapeOf<Shape<kGroup, 1>>(params, grid, stream);
  return LaunchShapeOf<Shape<kGroup, 2>>(params, grid, stream);
}

}  // namespace

DecodeGrid W4DecodeGrid(int32_t rows, int32_t columns, int32_t tokens, int32_t multiprocessors) {
  const int32_t slabs_of_block = kWarps * kChunkSlabs;
  DecodeGrid grid;
  grid.parts = (layout::GpuSlabs(columns) + slabs_of_block - 1) / slabs_of_block;
  const int32_t tiles = layout::GpuRowTiles(rows);
  const int32_t columns_of_tiles =
      multiprocessors / grid.parts > 0 ? multiprocessors / grid.parts : 1;
  grid.blocks = (tiles < columns_of_tiles ? tiles : columns_of_tiles) * grid.parts;
  return grid;
}

int64_t W4DecodeSplitBytes(int32_t rows, int32_t columns, int32_t tokens) {
  const DecodeGrid grid = W4DecodeGrid(rows, columns, tokens, 1);
  if (grid.parts == 1) return 0;
  return static_cast<int64_t>(layout::GpuRowTiles(rows)) * grid.parts * (tokens <= 8 ? 1 : 2) * 32 *
         static_cast<int64_t>(sizeof(float4));
}

int64_t W4DecodeBytes(int32_t rows, int32_t columns, int32_t group) {
  if (group != 0) return layout::GpuW4Bytes(rows, columns, group);
  return static_cast<int64_t>(layout::GpuRowTiles(rows)) * layout::GpuSlabs(columns) *
         kDenseSlabBytes;
}

cudaError_t W4Decode(const W4DecodeParams& params, int32_t multiprocessors, cudaStream_t stream) {
  if (params.tokens < 1 || params.tokens > 16 || params.columns % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  const DecodeGrid grid = W4DecodeGrid(params.rows, params.columns, params.tokens, multiprocessors);
  if (grid.parts > 1 && (params.split_sums == nullptr || params.split_arrivals == nullptr)) {
    return cudaErrorInvalidValue;
  }
  switch (params.group) {
    case 0:
      return Launch<0>(params, grid, stream);
    case 32:
      return Launch<32>(params, grid, stream);
    case 64:
      return Launch<64>(params, grid, stream);
    case 128:
      return Launch<128>(params, grid, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nibble::cuda
