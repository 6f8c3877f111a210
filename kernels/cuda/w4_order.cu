#include "kernels/cuda/w4_order.h"

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/peer_exchange.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/w4_fixed.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {
namespace {

constexpr int32_t kOrderThreads = 128;
constexpr int32_t kOrderTokens = 32;  // of a block

// A block: 32 tokens of a slab. A thread: one token's 8 k of each of the four lane columns that two
// k-steps take, which are four whole chunks.
__global__ void __launch_bounds__(kOrderThreads)
    OrderKernel(const __grid_constant__ OrderParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t token = static_cast<int32_t>(blockIdx.y) * kOrderTokens + thread / 4;
  if (token >= p.tokens) return;
  const int32_t group = p.group == 0 ? 128 : p.group;
  const int32_t slab = static_cast<int32_t>(blockIdx.x), pair = thread % 4;
  uint4 from[4];
#pragma unroll
  for (int32_t c = 0; c < 4; ++c) {
    const int32_t k = slab * layout::kGpuSlabColumns + layout::GpuKIndex(pair * 2, c, 0, group);
    from[c] =
        k < p.columns
            ? *reinterpret_cast<const uint4*>(p.x + static_cast<int64_t>(token) * p.columns + k)
            : make_uint4(0, 0, 0, 0);
  }
  const int64_t row =
      (static_cast<int64_t>(slab) * 2 + pair / 2) * layout::GpuOrderedTokens(p.tokens) + token;
  auto* to = reinterpret_cast<uint4*>(p.ordered + row * 64);
  const int32_t first = pair % 2 * 4;
  to[first ^ (token % 8)] = make_uint4(from[0].x, from[1].x, from[2].x, from[3].x);
  to[(first + 1) ^ (token % 8)] = make_uint4(from[0].y, from[1].y, from[2].y, from[3].y);
  to[(first + 2) ^ (token % 8)] = make_uint4(from[0].z, from[1].z, from[2].z, from[3].z);
  to[(first + 3) ^ (token % 8)] = make_uint4(from[0].w, from[1].w, from[2].w, from[3].w);
}

constexpr int32_t kChunks = 16;               // of a slab's token
constexpr int32_t kHeld = 4;                  // chunks of a thread that are read once
constexpr uint32_t kOtherNans = 0x7fff7fffu;  // in the place of two that would be kNotCome

// What is added to the residual first: nothing, a sum that another has taken, parts of a product,
// or such parts of all ranks.
enum class Adds : uint8_t { kNothing, kSum, kParts, kRanks };

// What a kernel instance is compiled for. Where parts are added up a thread has much to read, so
// there are more threads.
template <Adds kAdds>
struct NormShape {
  static constexpr int32_t kThreads = kAdds == Adds::kParts || kAdds == Adds::kRanks ? 512 : 256;
  static constexpr int32_t kSlabsAtOnce = kThreads / kChunks;
};

template <int32_t kThreads>
__device__ __forceinline__ float BlockSum(float value) {
  __shared__ float parts[kThreads / 32];
  value = SumOfWarp(value);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (const float part : parts) sum += part;
  return sum;
}

// A token's row; a chunk is eight numbers, pairs in four places.
struct NormRow {
  const OrderedNormParams& p;
  int32_t token;
  float* residual;
  const float* parts;
  int32_t group;

  __device__ __forceinline__ NormRow(const OrderedNormParams& params, int32_t row)
      : p(params), token(row), group(params.group == 0 ? 128 : params.group) {}
  __device__ __forceinline__ void Find() {
    const int64_t from = p.rows == nullptr ? token : p.rows[token];
    residual = p.residual + from * p.hidden;
    parts = p.parts + from * p.hidden;
  }
  __device__ __forceinline__ void LoadWeights(int32_t slab, int32_t chunk, Real16x2 (&w)[4]) const {
#pragma unroll
    for (int32_t c = 0; c < 4; ++c) {
      const int32_t k = Column(slab, chunk, c);
      w[c] = k < p.hidden ? LoadConstant(reinterpret_cast<const Real16x2*>(p.weight + k))
                          : ToReals(0, 0);
    }
  }
  // The residual as it is.
  __device__ __forceinline__ void Load(int32_t slab, int32_t chunk, float2 (&x)[4]) const {
#pragma unroll
    for (int32_t c = 0; c < 4; ++c) {
      const int32_t k = Column(slab, chunk, c);
      x[c] = k < p.hidden ? *reinterpret_cast<const float2*>(residual + k) : make_float2(0, 0);
    }
  }
  __device__ __forceinline__ void Keep(int32_t slab, int32_t chunk, const float2 (&x)[4]) const {
#pragma unroll
    for (int32_t c = 0; c < 4; ++c) {
      const int32_t k = Column(slab, chunk, c);
      if (k < p.hidden) *reinterpret_cast<float2*>(residual + k) = x[c];
    }
  }
  __device__ __forceinline__ void AddSum(int32_t slab, int32_t chunk, float2 (&x)[4]) const {
    const Real16* from = p.partial + static_cast<int64_t>(token) * p.hidden;
#pragma unroll
    for (int32_t c = 0; c < 4; ++c) {
      const int32_t k = Column(slab, chunk, c);
      const float2 more =
          k < p.hidden ? ToFloats(*reinterpret_cast<const Real16x2*>(from + k)) : make_float2(0, 0);
      x[c].x += more.x;
      x[c].y += more.y;
    }
  }
  // x and the parts, all asked for together.
  __device__ __forceinline__ void AddParts(int32_t slab, int32_t chunk, float2 (&x)[4]) const {
    float2 more[kWgmmaPartsMax][4];
#pragma unroll
    for (int32_t part = 0; part < kWgmmaPartsMax; ++part) {
      const float* from = parts + static_cast<int64_t>(part) * p.tokens * p.hidden;
#pragma unroll
      for (int32_t c = 0; c < 4; ++c) {
        const int32_t k = Column(slab, chunk, c);
        const bool exists = k < p.hidden && part < p.part_count;
        more[part][c] = exists ? *reinterpret_cast<const float2*>(from + k) : make_float2(0, 0);
      }
    }
#pragma unroll
    for (int32_t c = 0; c < 4; ++c) {
#pragma unroll
      for (int32_t part = 0; part < kWgmmaPartsMax; ++part) {
        x[c].x += more[part][c].x;
        x[c].y += more[part][c].y;
      }
    }
  }
  // The parts' sum, rounded, goes to every rank, the own one last.
  __device__ __forceinline__ void Push(int32_t slab, int32_t chunk, uint32_t number) const {
    const PeerExchange& exchange = p.exchange;
    float2 x[4] = {};
    AddParts(slab, chunk, x);
    uint32_t pairs[4];
#pragma unroll
    for (int32_t c = 0; c < 4; ++c) {
      const Real16x2 pair = ToReals(x[c].x, x[c].y);
      pairs[c] = *reinterpret_cast<const uint32_t*>(&pair);
      if (pairs[c] == kNotCome) pairs[c] = kOtherNans;
    }
    PushToAll(exchange, exchange.norms, exchange.norm_words, number, Word(slab, chunk),
              make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
  }
  // Onto the residual the ranks' parts, whose words are then as they were.
  __device__ __forceinline__ void AddRanks(int32_t slab, int32_t chunk, uint32_t number,
                                           float2 (&x)[4]) const {
    const PeerExchange& exchange = p.exchange;
    uint4* from = exchange.norms[exchange.rank] +
                  ExchangeSet(exchange, exchange.norm_words, number) + Word(slab, chunk);
    Load(slab, chunk, x);
    float2 sum[4] = {};
    TakeParts(exchange, from, exchange.norm_words, HaveCome,
              [&](const uint4& word, int32_t sender) {
                from[sender * exchange.norm_words] = FourNotCome();
                const auto* pairs = reinterpret_cast<const Real16x2*>(&word);
#pragma unroll
                for (int32_t c = 0; c < 4; ++c) {
                  const float2 pair = ToFloats(pairs[c]);
                  sum[c].x += pair.x;
                  sum[c].y += pair.y;
                }
              });
#pragma unroll
    for (int32_t c = 0; c < 4; ++c) {
      x[c].x += sum[c].x;
      x[c].y += sum[c].y;
    }
  }
  template <Adds kAdds>
  __device__ __forceinline__ void First(int32_t slab, int32_t chunk, uint32_t number,
                                        float2 (&x)[4]) const {
    if constexpr (kAdds == Adds::kRanks) {
      AddRanks(slab, chunk, number, x);
    } else {
      Load(slab, chunk, x);
      if constexpr (kAdds == Adds::kSum) AddSum(slab, chunk, x);
      if constexpr (kAdds == Adds::kParts) AddParts(slab, chunk, x);
    }
    if constexpr (kAdds != Adds::kNothing) Keep(slab, chunk, x);
  }
  __device__ __forceinline__ void Store(int32_t slab, int32_t chunk, const float2 (&x)[4],
                                        const Real16x2 (&w)[4], float inverse) const {
    Real16x2 values[4];
#pragma unroll
    for (int32_t c = 0; c < 4; ++c) {
      const float2 weight = ToFloats(w[c]);
      values[c] = ToReals(x[c].x * inverse * weight.x, x[c].y * inverse * weight.y);
    }
    const int64_t row =
        (static_cast<int64_t>(slab) * 2 + chunk / 8) * layout::GpuOrderedTokens(p.tokens) + token;
    reinterpret_cast<uint4*>(p.ordered)[row * 8 + (chunk % 8 ^ token % 8)] =
        *reinterpret_cast<const uint4*>(values);
  }

 private:
  // Of a chunk among a sender's words.
  [[nodiscard]] __device__ __forceinline__ int32_t Word(int32_t slab, int32_t chunk) const {
    return (token * layout::GpuSlabs(p.hidden) + slab) * kChunks + chunk;
  }
  [[nodiscard]] __device__ __forceinline__ int32_t Column(int32_t slab, int32_t chunk,
                                                          int32_t c) const {
    return slab * layout::kGpuSlabColumns + layout::GpuKIndex(chunk / 2, c, chunk % 2 * 2, group);
  }
};

__device__ __forceinline__ float SquareSum(const float2 (&x)[4]) {
  float sum = 0;
#pragma unroll
  for (const float2& pair : x) sum += pair.x * pair.x + pair.y * pair.y;
  return sum;
}

// A block: one token. A thread: a chunk of every so many slabs; a row that is not too long is read
// once. Weights come before what the kernel before leaves.
template <Adds kAdds>
__global__ void __launch_bounds__(NormShape<kAdds>::kThreads)
    OrderedNormKernel(const __grid_constant__ OrderedNormParams p) {
  LetNextKernelStart();  // a product, which brings weights meanwhile
  using S = NormShape<kAdds>;
  NormRow row(p, static_cast<int32_t>(blockIdx.x));
  const int32_t chunk = static_cast<int32_t>(threadIdx.x) % kChunks;
  const int32_t first = static_cast<int32_t>(threadIdx.x) / kChunks;
  const int32_t slabs = layout::GpuSlabs(p.hidden);
  Real16x2 weights[kHeld][4];
#pragma unroll
  for (int32_t i = 0; i < kHeld; ++i) {
    const int32_t slab = first + i * S::kSlabsAtOnce;
    if (slab < slabs) row.LoadWeights(slab, chunk, weights[i]);
  }
  WaitForPreviousKernel();
  row.Find();
  uint32_t number = 0;
  if constexpr (kAdds == Adds::kRanks) {
    number = p.exchange.epochs[kExchangeBlocksMax + blockIdx.x] + 1;
#pragma unroll 1
    for (int32_t slab = first; slab < slabs; slab += S::kSlabsAtOnce) row.Push(slab, chunk, number);
  }
  float2 held[kHeld][4];
  float squares = 0;
#pragma unroll
  for (int32_t i = 0; i < kHeld; ++i) {
    const int32_t slab = first + i * S::kSlabsAtOnce;
    if (slab < slabs) row.First<kAdds>(slab, chunk, number, held[i]);
  }
#pragma unroll
  for (int32_t i = 0; i < kHeld; ++i) {
    if (first + i * S::kSlabsAtOnce < slabs) squares += SquareSum(held[i]);
  }
  for (int32_t slab = first + kHeld * S::kSlabsAtOnce; slab < slabs; slab += S::kSlabsAtOnce) {
    if constexpr (kAdds == Adds::kRanks) break;  // kExchangeHiddenMax
    float2 x[4];
    row.First<kAdds>(slab, chunk, number, x);
    squares += SquareSum(x);
  }
  const float inverse =
      rsqrtf(BlockSum<S::kThreads>(squares) / static_cast<float>(p.hidden) + p.epsilon);
  if (kAdds == Adds::kRanks && threadIdx.x == 0) {  // all have read the number
    p.exchange.epochs[kExchangeBlocksMax + blockIdx.x] = number;
  }
  if (p.inverse_rms_out != nullptr && threadIdx.x == 0) p.inverse_rms_out[row.token] = inverse;
#pragma unroll
  for (int32_t i = 0; i < kHeld; ++i) {
    const int32_t slab = first + i * S::kSlabsAtOnce;
    if (slab < slabs) row.Store(slab, chunk, held[i], weights[i], inverse);
  }
  for (int32_t slab = first + kHeld * S::kSlabsAtOnce; slab < slabs; slab += S::kSlabsAtOnce) {
    float2 x[4];
    Real16x2 w[4];
    row.LoadWeights(slab, chunk, w);
    row.Load(slab, chunk, x);
    row.Store(slab, chunk, x, w, inverse);
  }
}

template <Adds kAdds>
cudaError_t LaunchNorm(const OrderedNormParams& params, const LaunchOptions& options) {
  return LaunchKernel(OrderedNormKernel<kAdds>,
                      {.grid = dim3(static_cast<uint32_t>(params.tokens)),
                       .block = dim3(NormShape<kAdds>::kThreads),
                       .stream = options.stream,
                       .dependent = options.dependent},
                      params);
}

constexpr int32_t kEmbedWarps = 8;

// A warp: a slab of a token, of which a lane has four numbers.
__global__ void __launch_bounds__(kEmbedWarps * 32)
    FixedEmbedKernel(const __grid_constant__ FixedEmbedParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const EmbedParams& embed = p.embed;
  const auto token = static_cast<int32_t>(blockIdx.y);
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int32_t slabs = layout::GpuSlabs(embed.hidden);
  const int32_t slab =
      static_cast<int32_t>(blockIdx.x) * kEmbedWarps + static_cast<int32_t>(threadIdx.x) / 32;
  if (slab >= slabs) return;
  const int32_t column = slab * layout::kGpuSlabColumns + lane * 4;
  int32_t id = embed.token_ids[token];
  if (id < 0) id = embed.last_tokens[-1 - id];
  uint2 values = make_uint2(0, 0), weights = make_uint2(0, 0);
  if (column < embed.hidden) {
    const Real16* row = embed.table + static_cast<int64_t>(id) * embed.hidden;
    values = *reinterpret_cast<const uint2*>(row + column);
    weights = *reinterpret_cast<const uint2*>(embed.next.norm_weight + column);
  }
  float x[4], v[4], squares = 0;
#pragma unroll
  for (int32_t i = 0; i < 4; ++i) {
    x[i] = ToFloat(reinterpret_cast<const Real16*>(&values)[i]);
    squares += x[i] * x[i];
    v[i] = x[i] * ToFloat(reinterpret_cast<const Real16*>(&weights)[i]) * kNormedInputFactor;
  }
  if (column < embed.hidden) {
    *reinterpret_cast<float4*>(embed.residual + static_cast<int64_t>(token) * embed.hidden +
                               column) = make_float4(x[0], x[1], x[2], x[3]);
  }
  StoreFixed(v, token, column, layout::GpuOrderedTokens(embed.tokens), embed.next.x, p.scales);
  squares = SumOfWarp(squares);
  if (lane != 0) return;
  embed.next.square_sums[token * slabs + slab] = squares;
  if (slab == 0) embed.scale_out[token] = 1;
}

}  // namespace

cudaError_t FixedEmbed(const FixedEmbedParams& params, const LaunchOptions& options) {
  const EmbedParams& embed = params.embed;
  if (embed.tokens < 1 || embed.tokens > 16 || embed.hidden % 8 != 0 ||
      kElement != Element::kHalf) {
    return cudaErrorInvalidValue;
  }
  const int32_t blocks = (layout::GpuSlabs(embed.hidden) + kEmbedWarps - 1) / kEmbedWarps;
  return LaunchKernel(
      FixedEmbedKernel,
      {.grid = dim3(static_cast<uint32_t>(blocks), static_cast<uint32_t>(embed.tokens)),
       .block = dim3(kEmbedWarps * 32),
       .stream = options.stream,
       .dependent = options.dependent},
      params);
}

cudaError_t OrderActivations(const OrderParams& params, const LaunchOptions& options) {
  if (params.tokens < 1 || params.columns % 8 != 0) return cudaErrorInvalidValue;
  const int32_t blocks = (params.tokens + kOrderTokens - 1) / kOrderTokens;
  return LaunchKernel(OrderKernel,
                      {.grid = dim3(static_cast<uint32_t>(layout::GpuSlabs(params.columns)),
                                    static_cast<uint32_t>(blocks)),
                       .block = dim3(kOrderThreads),
                       .stream = options.stream,
                       .dependent = options.dependent},
                      params);
}

cudaError_t OrderedNorm(const OrderedNormParams& params, const LaunchOptions& options) {
  if (params.tokens < 1 || params.hidden % 8 != 0) return cudaErrorInvalidValue;
  if (params.partial != nullptr) {
    if (params.parts != nullptr || params.rows != nullptr) return cudaErrorInvalidValue;
    return LaunchNorm<Adds::kSum>(params, options);
  }
  if (params.parts == nullptr) return LaunchNorm<Adds::kNothing>(params, options);
  if (params.part_count > kWgmmaPartsMax || params.rows != nullptr) return cudaErrorInvalidValue;
  if (params.exchange.ranks == 0) return LaunchNorm<Adds::kParts>(params, options);
  if (params.exchange.ranks > kPeersMax || params.tokens > kWgmmaPartsTokens ||
      params.hidden > kExchangeHiddenMax ||
      NormExchangeWords(params.tokens, params.hidden) > params.exchange.norm_words) {
    return cudaErrorInvalidValue;
  }
  return LaunchNorm<Adds::kRanks>(params, options);
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
