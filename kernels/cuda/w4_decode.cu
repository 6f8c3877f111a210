#include "kernels/cuda/w4_decode.h"

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/peer_exchange.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/silu.cuh"
#include "kernels/cuda/w4_decode_stream.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {
namespace {

using namespace decode;

// The row tiles of a block: every gridDim.x-th.
__device__ __forceinline__ int32_t RowTile(int32_t tile) {
  return static_cast<int32_t>(blockIdx.x + static_cast<uint32_t>(tile) * gridDim.x);
}
__device__ __forceinline__ int32_t TileCount(int32_t rows) {
  const auto blocks = static_cast<int32_t>(gridDim.x);
  return (layout::GpuRowTiles(rows) - RowTile(0) + blocks - 1) / blocks;
}

// Shared memory of a block: every warp's ring, then the partial sums of row tiles.
template <typename S>
struct SharedLayout {
  static constexpr int32_t kRing = kWarps * S::kSlots * S::kSlotBytes;
  static constexpr int32_t kPartialBytes =
      (S::kRowTiles > 2 ? S::kRowTiles : 2) * kWarps * S::kTokenTiles * 512;
  static constexpr int32_t kFull = kRing + kPartialBytes;  // barriers of the rings' slots
  static constexpr int32_t kMeetings = kFull + kWarps * S::kSlots * 8;
  static constexpr int32_t kFactors = kMeetings + 4 * 8;
  static constexpr int32_t kScales = kFactors + 16 * 4;
  static constexpr int32_t kSums = kScales + 16 * 4;
  static constexpr int32_t kAside = (kSums + kWarps * Fragments<S>::kSumBytes + 15) / 16 * 16;
  static constexpr int32_t kUsed = kAside + kWarps * Fragments<S>::kAsideBytes;
  static_assert(S::kBlocksTogether == 1 || kUsed <= kDecodeSharedBytes);
  static constexpr int32_t kBytes = kUsed < kDecodeSharedBytes ? kDecodeSharedBytes : kUsed;
};

// Partial sums of row tiles in shared memory. The block collects a round of tiles, meets, and a few
// of its warps, others each time, finish the round while the rest go on. Where a round takes half
// of the memory two take turns, so one meeting a round is enough.
//
// Where a round is a single tile, warps that have just finished one would keep every meeting
// waiting. Then nobody meets: a warp says that it has left its sums, and finishes a round behind
// its tile of the next.
template <typename S>
struct Rounds {
  static constexpr int32_t kBuffers = S::kResident ? 2 : 1;
  static constexpr int32_t kLag = S::kResident && S::kTokens >= 8 ? 1 : 0;
  static constexpr int32_t kPairs = S::kTokens < 2 ? 1 : S::kTokens / 2;  // of tokens
  // Whole units: a round that ends inside one would wait for copies that were never asked for.
  static constexpr int32_t kTiles = SharedLayout<S>::kPartialBytes / kBuffers / (kWarps * 128) /
                                    kPairs / S::kRowTiles * S::kRowTiles;
  // Warps that finish a round take eight rows r, r + 8 of four tokens at a time, so often at most.
  static constexpr int32_t kFinishers = (kTiles * kPairs + 1) / 2;
  static constexpr int32_t kTurns = (kFinishers + kWarps - 1) / kWarps;
  // No warp finishes two rounds in a row.
  static_assert(kTiles > 0 && (kLag == 0 || kFinishers <= kWarps / 2));

  float4* data;
  uint64_t* meetings;  // of each buffer: all have left their sums, and these have been read

  // A warp's place among those that finish the round, if it is less than kFinishers.
  static __device__ __forceinline__ int32_t Turn(int32_t round, int32_t warp) {
    return (warp + round * kFinishers) % kWarps;
  }
  __device__ __forceinline__ void Init() const {
    for (int32_t i = 0; i < kBuffers; ++i) {
      BarrierInit(meetings + 2 * i, kWarps);
      BarrierInit(meetings + 2 * i + 1, min(kFinishers, kWarps));
    }
  }
  // A warp has left its sums of a round.
  __device__ __forceinline__ void Leave(int32_t round, int32_t lane) const {
    if constexpr (kLag == 0) {
      __syncthreads();
    } else {
      __syncwarp();
      if (lane == 0) BarrierArrive(meetings + round % kBuffers * 2);
    }
  }
  __device__ __forceinline__ void AwaitAll(int32_t round) const {
    if constexpr (kLag > 0) {
      BarrierWait(meetings + round % kBuffers * 2, static_cast<uint32_t>(round / kBuffers % 2));
    }
  }
  // A warp has read what it finishes of a round.
  __device__ __forceinline__ void Free(int32_t round, int32_t lane) const {
    if constexpr (kLag > 0) {
      __syncwarp();
      if (lane == 0) BarrierArrive(meetings + round % kBuffers * 2 + 1);
    }
  }
  // The round's buffer has been read since it was written last.
  __device__ __forceinline__ void AwaitFree(int32_t round) const {
    if (round < kBuffers) return;
    if constexpr (kLag > 0) {
      BarrierWait(meetings + round % kBuffers * 2 + 1,
                  static_cast<uint32_t>((round / kBuffers - 1) % 2));
    } else if constexpr (kBuffers == 1) {
      __syncthreads();
    }
  }

  // What a lane keeps among its warp's sums until the first of them are there: `i` is 0 or 1.
  __device__ __forceinline__ float4* Place(int32_t i, int32_t lane, int32_t warp) const {
    constexpr int32_t kOfTile = kPairs * 8, kOfBuffer = kTiles * kOfTile;
    static_assert(kBuffers * kOfBuffer >= 64);
    const int32_t at = i * 32 + lane;
    return At(at / kOfBuffer, at % kOfBuffer / kOfTile, warp) + at % kOfTile;
  }
  // A warp's results of a tile: [pair of tokens][row] of rows r, r + 8 of both tokens.
  __device__ __forceinline__ float4* At(int32_t round, int32_t tile, int32_t warp) const {
    return data + ((round % kBuffers * kTiles + tile) * kWarps + warp) * kPairs * 8;
  }
  __device__ __forceinline__ void Put(float4* to, int32_t lane,
                                      const float (&acc)[S::kTokenTiles][4]) const {
    constexpr float kHigh = S::kGroup == 0 ? 1.0f : kBiasedHigh;
    if constexpr (S::kSharing > 1) {
      PutShared(to, lane, acc[0][0], acc[0][1], acc[0][2] * kHigh, acc[0][3] * kHigh);
    } else {
#pragma unroll
      for (int32_t t = 0; t < S::kTokenTiles; ++t) {
        to[(t * 4 + lane % 4) * 8] =
            make_float4(acc[t][0], acc[t][1], acc[t][2] * kHigh, acc[t][3] * kHigh);
      }
    }
  }
  // Slabs lie side by side in the columns: the lanes of a row add theirs up, and each is left with
  // a share of the row's results.
  __device__ __forceinline__ void PutShared(float4* to, int32_t lane, float a, float b, float c,
                                            float d) const {
    if constexpr (S::kSharing == 8) {
      a += __shfl_xor_sync(0xffffffffu, a, 2);
      c += __shfl_xor_sync(0xffffffffu, c, 2);
      a += __shfl_xor_sync(0xffffffffu, a, 1);
      c += __shfl_xor_sync(0xffffffffu, c, 1);
      if (lane % 4 == 0) *to = make_float4(a, 0, c, 0);
      return;
    }
    const bool upper = lane % 4 >= 2, odd = lane % 2 != 0;
    float first = upper ? c : a, second = upper ? d : b;
    first += __shfl_xor_sync(0xffffffffu, upper ? a : c, 2);
    second += __shfl_xor_sync(0xffffffffu, upper ? b : d, 2);
    if constexpr (S::kSharing == 2) {
      reinterpret_cast<float2*>(to + lane % 2 * 8)[lane % 4 / 2] = make_float2(first, second);
    } else {
      const float own =
          (odd ? second : first) + __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
      reinterpret_cast<float*>(to)[lane % 4] = own;
    }
  }
};
template <typename S>
__device__ __forceinline__ Rounds<S> MakeRounds(uint8_t* shared) {
  using Layout = SharedLayout<S>;
  Rounds<S> rounds;
  rounds.data = reinterpret_cast<float4*>(shared + Layout::kRing);
  rounds.meetings = reinterpret_cast<uint64_t*>(shared + Layout::kMeetings);
  return rounds;
}

// A warp's part of a token's sum of squares, all loads in flight at once.
__device__ __forceinline__ float LoadSquares(const NormedInput& normed, int32_t token,
                                             int32_t lane) {
  const float* parts = normed.square_sums + static_cast<int64_t>(token) * normed.parts;
  float sum = 0;
#pragma unroll 1
  for (int32_t begin = lane; begin < normed.parts; begin += 256) {
    float part[8];
#pragma unroll
    for (int32_t i = 0; i < 8; ++i) {
      part[i] = LoadFloatIf(begin + 32 * i < normed.parts, parts + begin + 32 * i);
    }
#pragma unroll
    for (int32_t i = 0; i < 8; ++i) sum += part[i];
  }
  return sum;
}

// Every warp sees to its tokens: what the results of a normed input are multiplied by, and what
// the next input is. Loaded with the activations, put in order when the first tiles are done.
template <typename S>
struct TokenFactors {
  float squares[S::kTokenTiles];
  float scale[S::kTokenTiles];
  float next_scale;

  __device__ __forceinline__ void Load(const W4DecodeParams& p, int32_t warp, int32_t lane) {
    next_scale = warp == 0 && lane < p.tokens && p.next.x != nullptr ? p.next.scale[lane] : 0;
    if (p.normed.scale == nullptr) return;
#pragma unroll
    for (int32_t i = 0; i < S::kTokenTiles; ++i) {
      const int32_t token = warp + i * kWarps;
      if (token >= p.tokens) continue;
      scale[i] = LoadFloatIf(true, p.normed.scale + token);
      squares[i] = LoadSquares(p.normed, token, lane);
    }
  }
  __device__ __forceinline__ void Store(const W4DecodeParams& p, int32_t warp, int32_t lane,
                                        float* factors, float* scales) const {
    if (warp == 0 && lane < 16) scales[lane] = next_scale * kNormedInputFactor;
    if (p.normed.scale == nullptr) {
      if (warp == 0 && lane < 16) factors[lane] = 1;
      return;
    }
#pragma unroll
    for (int32_t i = 0; i < S::kTokenTiles; ++i) {
      const int32_t token = warp + i * kWarps;
      if (token >= p.tokens) continue;
      const float mean = __fdividef(SumOfWarp(squares[i]), static_cast<float>(p.columns));
      const float inverse = rsqrtf(mean + p.normed.epsilon);
      if (lane != 0) continue;
      factors[token] = __fdividef(inverse, scale[i] * kNormedInputFactor);
      if (blockIdx.x == 0) p.normed.inverse_rms_out[token] = inverse;
    }
  }
};

// What one thread finishes: rows r, r + 8 of a row tile, for one token. Eight lanes side by side
// hold the rows of one token.
struct Item {
  int32_t tile = 0;  // of the round
  int32_t row_tile = 0;
  int32_t r = 0;
  int32_t token = 0;
  bool exists = false;
  int32_t at = 0;  // of row r in [token][row]
  int32_t to = 0;  // where the next product's input goes, that of row r
  float old[2];
  Real16 weight[2];

  // Of thread `index` of those that finish a round.
  template <typename S>
  __device__ __forceinline__ void Make(const W4DecodeParams& p, int32_t round, uint32_t index,
                                       int32_t tile_count) {
    const int32_t first = round * Rounds<S>::kTiles;
    constexpr uint32_t kTokens = 2 * Rounds<S>::kPairs;
    const uint32_t eight = index / 8;
    r = static_cast<int32_t>(index % 8);
    token = static_cast<int32_t>(eight % kTokens);
    tile = static_cast<int32_t>(eight / kTokens);
    row_tile = RowTile(first + tile);
    exists = tile < min(Rounds<S>::kTiles, tile_count - first) && token < p.tokens;
    at = token * p.rows + Row();
    const bool silu = p.output == DecodeOutput::kSiluMul;
    const layout::GpuFragmentOrder& order = silu ? p.y_order : p.next.order;
    const int32_t column = silu ? row_tile * 8 + r : Row();
    __builtin_assume(column >= 0);
    to = static_cast<int32_t>(order.Index(token, column, silu ? p.rows / 2 : p.rows));
    // Here, not behind the meeting.
    asm volatile("" : "+r"(to));
  }
  [[nodiscard]] __device__ __forceinline__ int32_t Row() const {
    return row_tile * layout::kGpuTileRows + r;
  }
  // Row r + 8 i is to be stored.
  [[nodiscard]] __device__ __forceinline__ bool Real(const W4DecodeParams& p, int32_t i) const {
    return exists && Row() + 8 * i < p.rows;
  }
  __device__ __forceinline__ void Put(float4* shared) const {
    const uint32_t small =
        static_cast<uint32_t>(r | tile << 8 | token << 16) | static_cast<uint32_t>(exists) << 31;
    PutWords(shared, make_uint4(static_cast<uint32_t>(at), static_cast<uint32_t>(to),
                                static_cast<uint32_t>(row_tile), small));
  }
  __device__ __forceinline__ void Take(const float4* shared) {
    const uint4 put = TakeWords(shared);
    at = static_cast<int32_t>(put.x);
    to = static_cast<int32_t>(put.y);
    row_tile = static_cast<int32_t>(put.z);
    r = static_cast<int32_t>(put.w & 0xff);
    tile = static_cast<int32_t>(put.w >> 8 & 0xff);
    token = static_cast<int32_t>(put.w >> 16 & 0xff);
    exists = put.w >> 31 != 0;
  }
  // Old residuals and norm weights, asked for while the tiles are still being multiplied.
  __device__ __forceinline__ void Prefetch(const W4DecodeParams& p) {
    if (p.output != DecodeOutput::kAddResidual) return;
#pragma unroll
    for (int32_t i = 0; i < 2; ++i) {
      if (!Real(p, i)) continue;
      old[i] = p.residual_out[at + 8 * i];
      if (p.next.x != nullptr) weight[i] = p.next.norm_weight[Row() + 8 * i];
    }
  }
};

// Onto the residual stream, and what the next product takes. Called by whole warps.
__device__ __forceinline__ void StoreResiduals(const W4DecodeParams& p, const Item& item, float low,
                                               float high, float scale) {
  const bool real[2] = {item.Real(p, 0), item.Real(p, 1)};
  const float value[2] = {low + item.old[0], high + item.old[1]};
  float* out = p.residual_out + item.at;
  if (real[0]) out[0] = value[0];
  if (real[1]) out[8] = value[1];
  if (p.next.x == nullptr) return;
  Real16* x = p.next.x + item.to;
  // The next eight k of fragments belong to the next k-steps, with groups of 32 to the next lane.
  const int32_t eight = p.next.order.exists() && p.next.order.shift > 0 ? 256 : 8;
  float squares = 0;
#pragma unroll
  for (int32_t i = 0; i < 2; ++i) {
    if (!real[i]) continue;
    x[i * eight] = ToReal(value[i] * ToFloat(item.weight[i]) * scale);
    squares += value[i] * value[i];
  }
#pragma unroll
  for (int32_t offset = 1; offset < 8; offset *= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  if (item.exists && item.r == 0) {
    p.next.square_sums[item.token * layout::GpuRowTiles(p.rows) + item.row_tile] = squares;
  }
}

// Where an item's rows lie among a sender's words.
__device__ __forceinline__ int32_t ExchangeWord(const W4DecodeParams& p, const Item& item) {
  return (item.token * layout::GpuRowTiles(p.rows) + item.row_tile) * 8 + item.r;
}
// This rank's part of rows r and r + 8.
__device__ __forceinline__ void PushItem(const W4DecodeParams& p, const Item& item, float low,
                                         float high, uint32_t number) {
  if (!item.exists) return;
  PushToAll(p.exchange, p.exchange.products, p.exchange.product_words, number,
            ExchangeWord(p, item),
            make_uint4(__float_as_uint(low), number, __float_as_uint(high), number));
}
// The ranks' parts of an item, added up in rank order. Called by whole warps.
__device__ __forceinline__ void StoreSum(const W4DecodeParams& p, const Item& item, float scale,
                                         uint32_t number) {
  const PeerExchange& exchange = p.exchange;
  float low = 0, high = 0;
  if (item.exists) {
    const uint4* from = exchange.products[exchange.rank] +
                        ExchangeSet(exchange, exchange.product_words, number) +
                        ExchangeWord(p, item);
    TakeParts(
        exchange, from, exchange.product_words,
        [number](const uint4& word) { return word.y == number && word.w == number; },
        [&](const uint4& word, int32_t) {
          low += __uint_as_float(word.x);
          high += __uint_as_float(word.z);
        });
  }
  __syncwarp();
  StoreResiduals(p, item, low, high, scale);
}

// Called by whole warps.
template <bool kPeers>
__device__ __forceinline__ void StoreItem(const W4DecodeParams& p, const Item& item, float low,
                                          float high, const float* factors, const float* scales,
                                          uint32_t number) {
  const float factor = factors[item.token];
  const float scale = scales[item.token];
  low *= factor;
  high *= factor;
  if (p.bias != nullptr) {
    if (item.Real(p, 0)) low += ToFloat(p.bias[item.Row()]);
    if (item.Real(p, 1)) high += ToFloat(p.bias[item.Row() + 8]);
  }
  if constexpr (kPeers) {
    PushItem(p, item, low, high, number);
    return;
  }
  if (p.output == DecodeOutput::kSiluMul) {
    if (item.exists && item.row_tile * 8 + item.r < p.rows / 2) {
      p.y_half[item.to] = ToReal(SiluTimes(low, high));
    }
  } else if (p.output == DecodeOutput::kAddResidual) {
    StoreResiduals(p, item, low, high, scale);
  } else if (p.output == DecodeOutput::kHalf) {
    if (item.Real(p, 0)) p.y_half[item.at] = ToReal(low);
    if (item.Real(p, 1)) p.y_half[item.at + 8] = ToReal(high);
  } else {
    if (item.Real(p, 0)) p.y_float[item.at] = low;
    if (item.Real(p, 1)) p.y_float[item.at + 8] = high;
  }
}

// Adds a tile's partial sums up in warp order, so that results do not vary, and stores them.
template <typename S, bool kPeers>
__device__ __forceinline__ void Finish(const W4DecodeParams& p, const Rounds<S>& rounds,
                                       int32_t round, const Item& item, const float* factors,
                                       const float* scales, uint32_t number) {
  const auto token = static_cast<uint32_t>(item.token);
  const float* from = reinterpret_cast<const float*>(rounds.At(round, item.tile, 0)) +
                      (token / 2 * 8 + item.r) * 4 + token % 2;
  // Of an item that does not exist, too: what it adds up goes nowhere.
  float low = 0, high = 0;
#pragma unroll
  for (int32_t warp = 0; warp < kWarps; ++warp) {
    low += from[warp * Rounds<S>::kPairs * 32];
    high += from[warp * Rounds<S>::kPairs * 32 + 2];
  }
  StoreItem<kPeers>(p, item, low, high, factors, scales, number);
}

// What this thread has to finish of the rounds of its block. With kPeers a round is finished in two
// steps: its parts go to all ranks at once, and the sums are taken when all rounds have gone.
template <typename S, bool kPeers>
struct Finisher {
  const W4DecodeParams& p;
  const Rounds<S>& rounds;
  int32_t warp, lane;
  int32_t tile_count;  // of the block
  const float* factors;
  const float* scales;

  // All that can be known of it before the sums are there.
  __device__ __forceinline__ void Aim(int32_t round, Item* item) const {
    const int32_t turn = Rounds<S>::Turn(round, warp);
    if (turn < Rounds<S>::kFinishers) {
      item->Make<S>(p, round, static_cast<uint32_t>(turn * 32 + lane), tile_count);
    }
  }
  // Where nobody waits for those who finish, they need to know only when the sums are there, but
  // for old residuals.
  [[nodiscard]] __device__ __forceinline__ bool AimsLate() const {
    return Rounds<S>::kLag > 0 && p.output != DecodeOutput::kAddResidual;
  }
  // When all have left their sums of the round.
  __device__ __forceinline__ void Complete(int32_t round, Item* item, uint32_t number) const {
    const int32_t turn = Rounds<S>::Turn(round, warp);
    if (turn >= Rounds<S>::kFinishers) return;
    if (AimsLate() && round > 0) Aim(round, item);
    rounds.AwaitAll(round);
#pragma unroll
    for (int32_t i = 0; i < Rounds<S>::kTurns; ++i) {
      const int32_t part = turn + i * kWarps;
      if (part >= Rounds<S>::kFinishers) break;
      if (i > 0) {
        item->Make<S>(p, round, static_cast<uint32_t>(part * 32 + lane), tile_count);
        if (!kPeers) item->Prefetch(p);
      }
      Finish<S, kPeers>(p, rounds, round, *item, factors, scales, number);
    }
    rounds.Free(round, lane);
  }
  // Where the last of a warp's rounds is its only turn, its item is at hand.
  __device__ __forceinline__ void TakeSums(int32_t round_count, Item* item, uint32_t number) const {
    bool at_hand = Rounds<S>::kTurns == 1;
    for (int32_t round = round_count - 1; round >= 0; --round) {
      for (int32_t part = Rounds<S>::Turn(round, warp); part < Rounds<S>::kFinishers;
           part += kWarps) {
        if (!at_hand) {
          item->Make<S>(p, round, static_cast<uint32_t>(part * 32 + lane), tile_count);
          item->Prefetch(p);
        }
        at_hand = false;
        StoreSum(p, *item, scales[item->token], number);
      }
    }
  }
};

// Cycles from one slot's first copies to the next one's, as they were best.
__device__ __forceinline__ int32_t Pace(int32_t tokens) {
  return tokens == 1 ? 2000 : tokens > 4 && tokens <= 8 ? 2250 : 1500;
}

template <typename S>
__device__ __forceinline__ void InitStream(const W4DecodeParams& p, const WarpRange& range,
                                           int32_t tile_count, uint8_t* shared, int32_t warp,
                                           int32_t lane, WeightStream<S>* stream) {
  const int32_t slabs = layout::GpuSlabs(p.columns);
  stream->ring = shared + warp * S::kSlots * S::kSlotBytes;
  stream->ring_address = SharedAddress(stream->ring);
  auto* full = reinterpret_cast<uint64_t*>(shared + SharedLayout<S>::kFull) + warp * S::kSlots;
  stream->full = SharedAddress(full);
  stream->next = p.slabs + (static_cast<int64_t>(RowTile(0)) * slabs + range.begin) * S::kSlabBytes;
  stream->tile_stride = gridDim.x * static_cast<uint32_t>(slabs * S::kSlabBytes);
  stream->slabs = range.end - range.begin;
  stream->tiles_left = stream->slabs > 0 ? tile_count : 0;
  // Slabs that a warp lacks are never copied: they must hold finite numbers all the same.
  if (stream->slabs % S::kUnitSlabs != 0) {
    for (int32_t i = lane; i < S::kSlots * S::kSlotBytes / 16; i += 32) {
      reinterpret_cast<uint4*>(shared + warp * S::kSlots * S::kSlotBytes)[i] =
          make_uint4(0, 0, 0, 0);
    }
    FenceSharedForCopies();
  }
  __syncwarp();
  if (lane == 0) {
    for (int32_t i = 0; i < S::kSlots; ++i) BarrierInit(full + i, 1);
    FenceBarrierInit();
  }
  // All at once would stand in the memory's queue before the activations of the kernel that has
  // just begun, and before what it waits for.
  const int64_t begin = clock64();
  const int32_t pace = p.dependent_launch ? (p.pace > 0 ? p.pace : Pace(p.tokens)) : 0;
  for (int32_t i = 0; i < S::kSlots && stream->tiles_left > 0; ++i) {
    while (clock64() - begin < i * pace) {
    }
    __syncwarp();
    stream->Issue(i, lane);
  }
}

template <typename S, bool kPeers>
__global__ void __launch_bounds__(kThreads, S::kBlocksTogether)
    W4DecodeKernel(const __grid_constant__ W4DecodeParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  LetNextKernelStart();
  // The same in all of a warp, and so that the compiler knows.
  const int32_t warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  const int32_t lane = threadIdx.x % 32;
  const WarpRange range = SlabRange(layout::GpuSlabs(p.columns), warp, kWarps);
  const Rounds<S> rounds = MakeRounds<S>(shared);
  int32_t tile_count = TileCount(p.rows);
  asm volatile("" : "+r"(tile_count));  // or it would be reckoned twice
  WeightStream<S> stream;
  InitStream<S>(p, range, tile_count, shared, warp, lane, &stream);
  if constexpr (Rounds<S>::kLag > 0) {
    if (threadIdx.x == 0) rounds.Init();
    __syncthreads();
  }
  float* factors = reinterpret_cast<float*>(shared + SharedLayout<S>::kFactors);
  float* scales = reinterpret_cast<float*>(shared + SharedLayout<S>::kScales);
  const Finisher<S, kPeers> finisher{p, rounds, warp, lane, tile_count, factors, scales};
  Item item;
  if constexpr (S::kTokenTiles == 1) {
    FirstLoads<S>(p, range, lane).Put(rounds.Place(0, lane, warp));
    finisher.Aim(0, &item);
    item.Put(rounds.Place(1, lane, warp));
  }
  WaitForPreviousKernel();

  uint32_t sums_before = 0;
  if constexpr (kPeers) sums_before = LoadWord(p.exchange.epochs + blockIdx.x);
  TokenFactors<S> token_factors;
  Fragments<S> x;
  x.sums =
      reinterpret_cast<float*>(shared + SharedLayout<S>::kSums + warp * Fragments<S>::kSumBytes);
  if constexpr (S::kTokenTiles == 1) {
    FirstLoads<S>(rounds.Place(0, lane, warp)).Load(p.x_order.exists(), &x);
  } else {
    LoadHalfUnit<S>(p, range.begin, range.end, 0, lane, &x);
    LoadHalfUnit<S>(p, range.begin, range.end, 1, lane, &x);
  }
  token_factors.Load(p, warp, lane);
  SumGroups<S>(lane, &x);
  x.aside =
      reinterpret_cast<uint4*>(shared + SharedLayout<S>::kAside + warp * Fragments<S>::kAsideBytes);
  x.PutAside(lane);
  __syncwarp();
  const int32_t round_count = (tile_count + Rounds<S>::kTiles - 1) / Rounds<S>::kTiles;
  for (int32_t round = 0; round < round_count + Rounds<S>::kLag; ++round) {
    if (round < round_count) {
      const int32_t tiles = min(Rounds<S>::kTiles, tile_count - round * Rounds<S>::kTiles);
      if (round == 0 && S::kTokenTiles == 1) {
        item.Take(rounds.Place(1, lane, warp));
        __syncwarp();
      } else if (round == 0 || !finisher.AimsLate()) {
        finisher.Aim(round, &item);
      }
      if (Rounds<S>::Turn(round, warp) < Rounds<S>::kFinishers) item.Prefetch(p);
      float4* to = rounds.At(round, 0, warp) + lane / 4;
      for (int32_t tile = 0; tile < tiles; tile += S::kRowTiles) {
        float acc[S::kRowTiles][S::kTokenTiles][4] = {};
        MultiplyTiles<S>(p, range, &stream, lane, tiles - tile, &x, acc);
        if (tile == 0) rounds.AwaitFree(round);
#pragma unroll
        for (int32_t t = 0; t < S::kRowTiles; ++t) {
          if (tile + t < tiles) rounds.Put(to, lane, acc[t]);
          to += kWarps * Rounds<S>::kPairs * 8;
        }
      }
      if (round == 0) token_factors.Store(p, warp, lane, factors, scales);
      rounds.Leave(round, lane);
    }
    if (round >= Rounds<S>::kLag) {
      finisher.Complete(round - Rounds<S>::kLag, &item, sums_before + 1);
    }
  }
  if constexpr (kPeers) {
    __syncthreads();  // all have read the number
    if (threadIdx.x == 0) p.exchange.epochs[blockIdx.x] = sums_before + 1;
    finisher.TakeSums(round_count, &item, sums_before + 1);
  }
}

template <typename S>
cudaError_t LaunchShapeOf(const W4DecodeParams& params, int32_t multiprocessors,
                          cudaStream_t stream) {
  constexpr int32_t kBytes = SharedLayout<S>::kBytes;
  const auto kernel =
      params.exchange.ranks > 0 ? W4DecodeKernel<S, true> : W4DecodeKernel<S, false>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  return LaunchKernel(kernel,
                      {.grid = dim3(static_cast<uint32_t>(multiprocessors)),
                       .block = dim3(kThreads),
                       .shared_bytes = kBytes,
                       .stream = stream,
                       .dependent = params.dependent_launch},
                      params);
}

// Whether up to four tokens take units of two slabs of two row tiles, as streamed ones do, although
// their activations could stay in registers: as measured (NOTES.md, "Sums over GPUs").
bool TakesTwoRowTiles(const W4DecodeParams& params, int32_t multiprocessors) {
  if (params.output != DecodeOutput::kAddResidual) return false;
  const int32_t slabs = layout::GpuSlabs(params.columns);
  // A resident unit would be half empty.
  if (slabs <= 2 * kWarps) return params.tokens > 2;
  if (layout::GpuRowTiles(params.rows) <= 2 * multiprocessors) return false;
  return slabs <= 4 * kWarps ? params.tokens <= 2 : params.tokens == 1 && slabs > 8 * kWarps;
}

// Where activations can stay in registers, else streamed.
template <int32_t kGroup, int32_t kResidentTokens, int32_t kStreamedTokens>
cudaError_t LaunchTokens(const W4DecodeParams& params, int32_t multiprocessors,
                         cudaStream_t stream) {
  using Resident = Shape<kGroup, kResidentTokens, 1>;
  const int32_t slabs = layout::GpuSlabs(params.columns);
  if constexpr (kGroup == 128 && kStreamedTokens == 4) {
    if (TakesTwoRowTiles(params, multiprocessors)) {
      return LaunchShapeOf<Shape<kGroup, 4, 2>>(params, multiprocessors, stream);
    }
  }
  if (slabs <= kWarps * Resident::kRowSlabs) {
    return LaunchShapeOf<Resident>(params, multiprocessors, stream);
  }
  if constexpr (kGroup == 128 && kResidentTokens == 2) {
    // Two tokens' activations of twice as long a row fill no more registers than four tokens' of
    // one unit, nor do one token's of four units.
    if (slabs <= kWarps * Shape<kGroup, 2, 1, 2>::kRowSlabs) {
      return LaunchShapeOf<Shape<kGroup, 2, 1, 2>>(params, multiprocessors, stream);
    }
    if (params.tokens == 1 && slabs <= kWarps * Shape<kGroup, 1, 1, 4>::kRowSlabs) {
      return LaunchShapeOf<Shape<kGroup, 1, 1, 4>>(params, multiprocessors, stream);
    }
  }
  if constexpr (kStreamedTokens == 16 && kGroup != 0) {
    // Where blocks have enough row tiles that few of the last unit's are empty.
    const int32_t tiles =
        (layout::GpuRowTiles(params.rows) + multiprocessors - 1) / multiprocessors;
    const int32_t units = (tiles + 3) / 4;
    if (8 * (4 * units - tiles) <= tiles) {
      return LaunchShapeOf<Shape<kGroup, 16, 4>>(params, multiprocessors, stream);
    }
  }
  return LaunchShapeOf<Shape<kGroup, kStreamedTokens, 2>>(params, multiprocessors, stream);
}

template <int32_t kGroup>
cudaError_t Launch(const W4DecodeParams& params, int32_t multiprocessors, cudaStream_t stream) {
  if (params.tokens > 8) return LaunchTokens<kGroup, 16, 16>(params, multiprocessors, stream);
  if constexpr (kGroup != 0) {
    if (params.tokens <= 2) return LaunchTokens<kGroup, 2, 4>(params, multiprocessors, stream);
    if (params.tokens <= 4) return LaunchTokens<kGroup, 4, 4>(params, multiprocessors, stream);
  } else if (params.tokens <= 2) {
    return LaunchTokens<kGroup, 8, 8>(params, multiprocessors, stream);
  }
  // Smaller groups' sums find no room beside the activations that are put aside.
  if constexpr (kGroup == 128) return LaunchTokens<kGroup, 8, 8>(params, multiprocessors, stream);
  return LaunchShapeOf<Shape<kGroup, 8, 2>>(params, multiprocessors, stream);
}

}  // namespace

cudaError_t W4Decode(const W4DecodeParams& params, int32_t multiprocessors, cudaStream_t stream) {
  if (params.tokens < 1 || params.tokens > 16 || params.columns % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  if (params.exchange.ranks > 0 &&
      (params.output != DecodeOutput::kAddResidual || params.exchange.ranks > kPeersMax ||
       multiprocessors > kExchangeBlocksMax ||
       ProductExchangeWords(params.tokens, params.rows) > params.exchange.product_words)) {
    return cudaErrorInvalidValue;
  }
  switch (params.group) {
    case 0:
      return Launch<0>(params, multiprocessors, stream);
    case 32:
      return Launch<32>(params, multiprocessors, stream);
    case 64:
      return Launch<64>(params, multiprocessors, stream);
    case 128:
      return Launch<128>(params, multiprocessors, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
