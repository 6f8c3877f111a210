#include "kernels/cuda/elementwise.h"

#include "kernels/cuda/attention_layout.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kWarps = kThreads / 32;

__device__ __forceinline__ float WarpSum(float value) {
#pragma unroll
  for (int32_t offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// The sum over a block, on every thread.
__device__ __forceinline__ float BlockSum(float value) {
  __shared__ float parts[kWarps];
  value = WarpSum(value);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int32_t warp = 0; warp < kWarps; ++warp) sum += parts[warp];
  return sum;
}

__global__ void __launch_bounds__(kThreads) EmbedKernel(const __grid_constant__ EmbedParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int64_t token = blockIdx.x;
  int32_t id = p.token_ids[token];
  if (id < 0) id = p.last_tokens[-1 - id];
  const half* row = p.table + static_cast<int64_t>(id) * p.hidden;
  float squares = 0;
  for (int32_t i = threadIdx.x; i < p.hidden; i += kThreads) {
    const float value = __half2float(row[i]);
    p.residual[token * p.hidden + i] = value;
    squares += value * value;
  }
  if (p.next.x == nullptr) return;
  squares = BlockSum(squares);
  const float inverse = rsqrtf(squares / static_cast<float>(p.hidden) + p.epsilon);
  for (int32_t i = threadIdx.x; i < p.hidden; i += kThreads) {
    p.next.x[p.next.order.Index(static_cast<int32_t>(token), i, p.hidden)] = __float2half(
        __half2float(row[i]) * inverse * kNormedInputFactor * __half2float(p.next.norm_weight[i]));
  }
  if (threadIdx.x == 0) {
    p.next.square_sums[token] = squares;
    p.scale_out[token] = inverse;
  }
}

__global__ void __launch_bounds__(kThreads) RmsNormKernel(const __grid_constant__ RmsNormParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int64_t token = blockIdx.x;
  const int64_t from = p.rows == nullptr ? token : p.rows[token];
  const float* row = p.residual + from * p.hidden;
  float squares = 0;
  for (int32_t i = threadIdx.x; i < p.hidden; i += kThreads) squares += row[i] * row[i];
  const float inverse = rsqrtf(BlockSum(squares) / static_cast<float>(p.hidden) + p.epsilon);
  for (int32_t i = threadIdx.x; i < p.hidden; i += kThreads) {
    p.out[token * p.hidden + i] = __float2half(row[i] * inverse * __half2float(p.weight[i]));
  }
}

__global__ void __launch_bounds__(kThreads) AddKernel(const __grid_constant__ AddParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (at >= p.count) return;
  float4 sum = *reinterpret_cast<const float4*>(p.residual + at);
  const float4 more = *reinterpret_cast<const float4*>(p.projected + at);
  sum.x += more.x;
  sum.y += more.y;
  sum.z += more.z;
  sum.w += more.w;
  *reinterpret_cast<float4*>(p.residual + at) = sum;
}

// One thread per eight columns: a tile's gates lie before its ups.
__global__ void __launch_bounds__(kThreads) SiluMulKernel(const __grid_constant__ SiluMulParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= static_cast<int64_t>(p.tokens) * (p.ffn / 8)) return;
  const uint4* tile = reinterpret_cast<const uint4*>(p.gate_up) + index * 2;
  const uint4 gates = tile[0], ups = tile[1];
  uint4 result;
  const half* gate = reinterpret_cast<const half*>(&gates);
  const half* up = reinterpret_cast<const half*>(&ups);
  half* out = reinterpret_cast<half*>(&result);
#pragma unroll
  for (int32_t i = 0; i < 8; ++i) {
    const float g = __half2float(gate[i]);
    out[i] = __float2half(g / (1.0f + __expf(-g)) * __half2float(up[i]));
  }
  const int32_t eights = p.ffn / 8;
  const int64_t stride = p.out_stride == 0 ? p.ffn : p.out_stride;
  *reinterpret_cast<uint4*>(p.out + index / eights * stride + index % eights * 8) = result;
}

// A KV block and head of keys or values, and the token's place in it.
struct CachePlace {
  half* tile;
  int32_t position;
};

__device__ __forceinline__ CachePlace PlaceOf(const RopeParams& p, half* cache, int32_t token,
                                              int32_t kv_head) {
  const int64_t tile = static_cast<int64_t>(p.blocks[token]) * p.kv_heads + kv_head;
  return {cache + tile * kKvBlockTokens * p.head_dim, p.positions[token] % kKvBlockTokens};
}

// What a thread has of a head: elements i … i + 7 of both halves.
struct HeadEights {
  float low[8], high[8];

  __device__ __forceinline__ void Load(const half* values, int32_t half_dim) {
    const uint4 eights[2] = {*reinterpret_cast<const uint4*>(values),
                             *reinterpret_cast<const uint4*>(values + half_dim)};
    const auto* halves = reinterpret_cast<const half*>(eights);
#pragma unroll
    for (int32_t i = 0; i < 8; ++i) {
      low[i] = __half2float(halves[i]);
      high[i] = __half2float(halves[8 + i]);
    }
  }
  // `threads` side by side have the whole head.
  __device__ __forceinline__ void Norm(const half* weight, float epsilon, int32_t half_dim,
                                       int32_t threads) {
    float squares = 0;
#pragma unroll
    for (int32_t i = 0; i < 8; ++i) squares += low[i] * low[i] + high[i] * high[i];
    for (int32_t offset = threads / 2; offset > 0; offset /= 2) {
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    }
    const float inverse = rsqrtf(squares / static_cast<float>(2 * half_dim) + epsilon);
#pragma unroll
    for (int32_t i = 0; i < 8; ++i) {
      low[i] *= inverse * __half2float(weight[i]);
      high[i] *= inverse * __half2float(weight[half_dim + i]);
    }
  }
  __device__ __forceinline__ void Rotate(const float* cos, const float* sin) {
#pragma unroll
    for (int32_t i = 0; i < 8; i += 4) {
      const float4 c = __ldg(reinterpret_cast<const float4*>(cos + i));
      const float4 s = __ldg(reinterpret_cast<const float4*>(sin + i));
      const float cs[4] = {c.x, c.y, c.z, c.w}, sn[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) {
        const float l = low[i + j], h = high[i + j];
        low[i + j] = l * cs[j] - h * sn[j];
        high[i + j] = h * cs[j] + l * sn[j];
      }
    }
  }
  static __device__ __forceinline__ void Store(half* to, const float (&values)[8]) {
    half2 pairs[4];
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
    }
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(pairs);
  }
};

// As many threads side by side as a head has sixteens: 16-byte chunks of qkv and of the cache.
__global__ void __launch_bounds__(kThreads) RopeKernel(const __grid_constant__ RopeParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int32_t threads = p.head_dim / 16, half_dim = p.head_dim / 2;
  const int32_t index = static_cast<int32_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int32_t all_heads = p.heads + 2 * p.kv_heads;
  const int32_t all = p.tokens * all_heads;
  // Threads behind the last head take part in sums.
  const int32_t token = min(index / threads, all - 1) / all_heads;
  const int32_t head = min(index / threads, all - 1) % all_heads;
  const int32_t first = index % threads * 8;
  half* values = p.qkv + (static_cast<int64_t>(token) * all_heads + head) * p.head_dim + first;
  HeadEights x;
  x.Load(values, half_dim);
  const bool is_query = head < p.heads, is_value = head >= p.heads + p.kv_heads;
  if (p.q_norm != nullptr) {
    HeadEights normed = x;
    normed.Norm((is_query ? p.q_norm : p.k_norm) + first, p.epsilon, half_dim, threads);
    if (!is_value) x = normed;
  }
  if (index / threads >= all) return;
  if (!is_value) {
    const int64_t angle = static_cast<int64_t>(p.positions[token]) * half_dim + first;
    x.Rotate(p.cos + angle, p.sin + angle);
  }
  half* to[2] = {values, values + half_dim};
  if (!is_query) {
    const int32_t kv_head = (head - p.heads) % p.kv_heads;
    const CachePlace place = PlaceOf(p, is_value ? p.cache.values : p.cache.keys, token, kv_head);
    to[0] = place.tile + KvOffset(place.position, first, p.head_dim);
    to[1] = place.tile + KvOffset(place.position, first + half_dim, p.head_dim);
  }
  HeadEights::Store(to[0], x.low);
  HeadEights::Store(to[1], x.high);
}

__global__ void __launch_bounds__(kThreads)
    CopyBlocksKernel(const __grid_constant__ CopyBlocksParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  uint8_t* part = p.cache + blockIdx.x * p.part_bytes;
  const int64_t from = p.from_to[2 * blockIdx.y], to = p.from_to[2 * blockIdx.y + 1];
  const uint4* source = reinterpret_cast<const uint4*>(part + from * p.block_bytes);
  uint4* target = reinterpret_cast<uint4*>(part + to * p.block_bytes);
  for (int64_t i = threadIdx.x; i < p.block_bytes / 16; i += kThreads) target[i] = source[i];
}

__global__ void __launch_bounds__(kThreads) ScatterKernel(const __grid_constant__ ScatterParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int32_t i = static_cast<int32_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < p.count && p.pairs[2 * i] >= 0) p.target[p.pairs[2 * i]] = p.pairs[2 * i + 1];
}

// Finisher of MurmurHash3.
__device__ __forceinline__ uint32_t Mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ x >> 16;
}

struct FillParams {
  uint8_t* nibbles;
  half* halves;
  int64_t count;
  float middle, amplitude;
  uint32_t seed;
};

__global__ void __launch_bounds__(kThreads) FillKernel(const __grid_constant__ FillParams p) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.count;
       i += stride) {
    const uint32_t bits = Mix(static_cast<uint32_t>(i) ^ Mix(p.seed + (i >> 32)));
    if (p.nibbles != nullptr) {
      p.nibbles[i] = static_cast<uint8_t>(bits >> 28);
    } else {
      const float unit = static_cast<float>(bits >> 8) * 0x1p-23f - 1.0f;
      p.halves[i] = __float2half(p.middle + p.amplitude * unit);
    }
  }
}

LaunchShape Shape(int64_t blocks, const LaunchOptions& options) {
  return {.grid = dim3(static_cast<uint32_t>(blocks)),
          .block = dim3(kThreads),
          .stream = options.stream,
          .dependent = options.dependent};
}

int64_t BlocksFor(int64_t work) { return (work + kThreads - 1) / kThreads; }

}  // namespace

cudaError_t Embed(const EmbedParams& params, const LaunchOptions& options) {
  return LaunchKernel(EmbedKernel, Shape(params.tokens, options), params);
}

cudaError_t RmsNorm(const RmsNormParams& params, const LaunchOptions& options) {
  return LaunchKernel(RmsNormKernel, Shape(params.tokens, options), params);
}

cudaError_t AddResidual(const AddParams& params, const LaunchOptions& options) {
  return LaunchKernel(AddKernel, Shape(BlocksFor(params.count / 4), options), params);
}

cudaError_t SiluMul(const SiluMulParams& params, const LaunchOptions& options) {
  const int64_t eights = static_cast<int64_t>(params.tokens) * (params.ffn / 8);
  return LaunchKernel(SiluMulKernel, Shape(BlocksFor(eights), options), params);
}

cudaError_t RopeAndStore(const RopeParams& params, const LaunchOptions& options) {
  if (params.head_dim % 16 != 0 || 32 % (params.head_dim / 16) != 0) return cudaErrorInvalidValue;
  const int64_t heads = static_cast<int64_t>(params.tokens) * (params.heads + 2 * params.kv_heads);
  const int64_t threads = heads * (params.head_dim / 16);
  return LaunchKernel(RopeKernel, Shape(BlocksFor(threads), options), params);
}

cudaError_t CopyBlocks(const CopyBlocksParams& params, const LaunchOptions& options) {
  LaunchShape shape = Shape(params.parts, options);
  shape.grid.y = static_cast<uint32_t>(params.copies);
  return LaunchKernel(CopyBlocksKernel, shape, params);
}

cudaError_t Scatter(const ScatterParams& params, const LaunchOptions& options) {
  return LaunchKernel(ScatterKernel, Shape(BlocksFor(params.count), options), params);
}

cudaError_t FillRandomBytes(uint8_t* nibbles, int64_t count, uint32_t seed, cudaStream_t stream) {
  return LaunchKernel(FillKernel, Shape(1024, {.stream = stream}),
                      FillParams{nibbles, nullptr, count, 0, 0, seed});
}

cudaError_t FillRandomHalves(half* halves, int64_t count, float middle, float amplitude,
                             uint32_t seed, cudaStream_t stream) {
  return LaunchKernel(FillKernel, Shape(1024, {.stream = stream}),
                      FillParams{nullptr, halves, count, middle, amplitude, seed});
}

}  // namespace nibble::cuda
