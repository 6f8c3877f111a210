#include "kernels/cuda/elementwise.h"

#include "kernels/cuda/attention_layout.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/elementwise_launch.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {
namespace {

constexpr int32_t kThreads = kElementwiseThreads;
constexpr int32_t kWarps = kThreads / 32;

// The sum over a block, on every thread.
__device__ __forceinline__ float BlockSum(float value) {
  __shared__ float parts[kWarps];
  value = SumOfWarp(value);
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
  const Real16* row = p.table + static_cast<int64_t>(id) * p.hidden;
  float squares = 0;
  for (int32_t i = threadIdx.x; i < p.hidden; i += kThreads) {
    const float value = ToFloat(row[i]);
    p.residual[token * p.hidden + i] = value;
    squares += value * value;
  }
  if (p.next.x == nullptr) return;
  squares = BlockSum(squares);
  const float inverse = rsqrtf(squares / static_cast<float>(p.hidden) + p.epsilon);
  for (int32_t i = threadIdx.x; i < p.hidden; i += kThreads) {
    p.next.x[p.next.order.Index(static_cast<int32_t>(token), i, p.hidden)] =
        ToReal(ToFloat(row[i]) * inverse * kNormedInputFactor * ToFloat(p.next.norm_weight[i]));
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
    p.out[token * p.hidden + i] = ToReal(row[i] * inverse * ToFloat(p.weight[i]));
  }
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
  const Real16* gate = reinterpret_cast<const Real16*>(&gates);
  const Real16* up = reinterpret_cast<const Real16*>(&ups);
  Real16* out = reinterpret_cast<Real16*>(&result);
#pragma unroll
  for (int32_t i = 0; i < 8; ++i) {
    const float g = ToFloat(gate[i]);
    out[i] = ToReal(g / (1.0f + __expf(-g)) * ToFloat(up[i]));
  }
  const int32_t eights = p.ffn / 8;
  const int64_t stride = p.out_stride == 0 ? p.ffn : p.out_stride;
  *reinterpret_cast<uint4*>(p.out + index / eights * stride + index % eights * 8) = result;
}

// A KV block and head of keys or values, and the token's place in it.
struct CachePlace {
  Real16* tile;
  int32_t position;
};

__device__ __forceinline__ CachePlace PlaceOf(const RopeParams& p, Real16* cache, int32_t token,
                                              int32_t kv_head) {
  const int64_t tile = static_cast<int64_t>(p.blocks[token]) * p.kv_heads + kv_head;
  return {cache + tile * kKvBlockTokens * p.head_dim, p.positions[token] % kKvBlockTokens};
}

// What a thread has of a head: elements i … i + 7 of both halves.
struct HeadEights {
  float low[8], high[8];

  __device__ __forceinline__ void Load(const Real16* values, int32_t half_dim) {
    const uint4 eights[2] = {*reinterpret_cast<const uint4*>(values),
                             *reinterpret_cast<const uint4*>(values + half_dim)};
    const auto* halves = reinterpret_cast<const Real16*>(eights);
#pragma unroll
    for (int32_t i = 0; i < 8; ++i) {
      low[i] = ToFloat(halves[i]);
      high[i] = ToFloat(halves[8 + i]);
    }
  }
  // `threads` side by side have the whole head.
  __device__ __forceinline__ void Norm(const Real16* weight, float epsilon, int32_t half_dim,
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
      low[i] *= inverse * ToFloat(weight[i]);
      high[i] *= inverse * ToFloat(weight[half_dim + i]);
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
  static __device__ __forceinline__ void Store(Real16* to, const float (&values)[8]) {
    Real16x2 pairs[4];
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
      pairs[i] = ToReals(values[2 * i], values[2 * i + 1]);
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
  Real16* values = p.qkv + (static_cast<int64_t>(token) * all_heads + head) * p.head_dim + first;
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
  Real16* to[2] = {values, values + half_dim};
  if (!is_query) {
    const int32_t kv_head = (head - p.heads) % p.kv_heads;
    const CachePlace place = PlaceOf(p, is_value ? p.cache.values : p.cache.keys, token, kv_head);
    to[0] = place.tile + KvOffset(place.position, first, p.head_dim);
    to[1] = place.tile + KvOffset(place.position, first + half_dim, p.head_dim);
  }
  HeadEights::Store(to[0], x.low);
  HeadEights::Store(to[1], x.high);
}

}  // namespace

cudaError_t Embed(const EmbedParams& params, const LaunchOptions& options) {
  return LaunchKernel(EmbedKernel, ElementwiseShape(params.tokens, options), params);
}

cudaError_t RmsNorm(const RmsNormParams& params, const LaunchOptions& options) {
  return LaunchKernel(RmsNormKernel, ElementwiseShape(params.tokens, options), params);
}

cudaError_t SiluMul(const SiluMulParams& params, const LaunchOptions& options) {
  const int64_t eights = static_cast<int64_t>(params.tokens) * (params.ffn / 8);
  return LaunchKernel(SiluMulKernel, ElementwiseShape(ElementwiseBlocks(eights), options), params);
}

cudaError_t RopeAndStore(const RopeParams& params, const LaunchOptions& options) {
  if (params.head_dim % 16 != 0 || 32 % (params.head_dim / 16) != 0) return cudaErrorInvalidValue;
  const int64_t heads = static_cast<int64_t>(params.tokens) * (params.heads + 2 * params.kv_heads);
  const int64_t threads = heads * (params.head_dim / 16);
  return LaunchKernel(RopeKernel, ElementwiseShape(ElementwiseBlocks(threads), options), params);
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
