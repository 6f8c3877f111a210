#include "kernels/cuda/all_reduce.h"

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {
namespace {

constexpr int32_t kThreads = kExchangeColumns / 4;
constexpr int32_t kWarps = kThreads / 32;
constexpr int32_t kWordsOfBlock = kExchangeColumns / 2;  // 16-byte words, two numbers each
constexpr int32_t kPollsBetweenChecks = 1 << 10;
constexpr int32_t kRowThreads = 256;

// Data and flag in one store that is never seen in halves of 8 bytes.
__device__ __forceinline__ void Push(uint4* to, float a, float b, uint32_t flag) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to),
               "r"(__float_as_uint(a)), "r"(flag), "r"(__float_as_uint(b)), "r"(flag)
               : "memory");
}
__device__ __forceinline__ uint4 Peek(const uint4* from) {
  uint4 word;
  asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from)
               : "memory");
  return word;
}
__device__ __forceinline__ uint64_t GlobalTimer() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Whether a wait must be left; writes down why.
__device__ bool MustLeave(const PeerExchange& exchange, uint64_t* begin) {
  if (*static_cast<volatile uint32_t*>(exchange.failed) != 0) return true;
  const uint64_t now = GlobalTimer();
  if (*begin == 0) *begin = now;
  ExchangeFault fault = ExchangeFault::kNone;
  if (*exchange.abort_word != 0) fault = ExchangeFault::kAborted;
  if (now - *begin > exchange.limit_ns) fault = ExchangeFault::kTimeout;
  if (fault == ExchangeFault::kNone) return false;
  *exchange.failed = 1;
  *exchange.fault = static_cast<uint32_t>(fault);
  return true;
}

__device__ __forceinline__ float2 Take(const PeerExchange& exchange, const uint4* from,
                                       uint32_t flag) {
  uint64_t begin = 0;
  for (int32_t polls = 1;; ++polls) {
    const uint4 word = Peek(from);
    if (word.y == flag && word.w == flag) {
      return make_float2(__uint_as_float(word.x), __uint_as_float(word.z));
    }
    if (polls % kPollsBetweenChecks == 0 && MustLeave(exchange, &begin)) return make_float2(0, 0);
  }
}

__global__ void __launch_bounds__(kThreads)
    AllReduceAddKernel(const __grid_constant__ AllReduceAddParams p) {
  __shared__ float squares[kWarps];
  const PeerExchange& exchange = p.exchange;
  const int32_t parts = ExchangeParts(p.hidden);
  const auto block = static_cast<int32_t>(blockIdx.x);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t token = block / parts;
  const int32_t column = block % parts * kExchangeColumns + 4 * thread;
  const bool real = column < p.hidden;
  const int64_t at = static_cast<int64_t>(token) * p.hidden + column;
  float weight[4] = {};
  if (real && p.next.x != nullptr) {
    for (int32_t i = 0; i < 4; ++i) weight[i] = ToFloat(p.next.norm_weight[column + i]);
  }
  WaitForPreviousKernel();
  LetNextKernelStart();
  const uint32_t flag = exchange.epochs[block] + 1;
  const auto place = [&](int32_t owner, int32_t sender) {
    const int64_t set = (flag & 1) * exchange.ranks + sender;
    return exchange.slots[owner] + (set * exchange.blocks_max + block) * kWordsOfBlock + thread;
  };
  float4 sum = make_float4(0, 0, 0, 0);
  float4 residual = sum;
  if (real) {
    const float4 mine = *reinterpret_cast<const float4*>(p.partial + at);
    for (int32_t i = 1; i < exchange.ranks; ++i) {
      uint4* to = place((exchange.rank + i) % exchange.ranks, exchange.rank);
      Push(to, mine.x, mine.y, flag);
      Push(to + kThreads, mine.z, mine.w, flag);
    }
    residual = *reinterpret_cast<const float4*>(p.residual + at);
    for (int32_t sender = 0; sender < exchange.ranks; ++sender) {
      float4 value = mine;
      if (sender != exchange.rank) {
        const uint4* from = place(exchange.rank, sender);
        const float2 low = Take(exchange, from, flag);
        const float2 high = Take(exchange, from + kThreads, flag);
        value = make_float4(low.x, low.y, high.x, high.y);
      }
      sum.x += value.x;
      sum.y += value.y;
      sum.z += value.z;
      sum.w += value.w;
    }
    residual.x += sum.x;
    residual.y += sum.y;
    residual.z += sum.z;
    residual.w += sum.w;
    *reinterpret_cast<float4*>(p.residual + at) = residual;
  }
  __syncthreads();  // all have read the number
  if (thread == 0) exchange.epochs[block] = flag;
  if (p.next.x == nullptr) return;
  if (real) {
    const float scale = p.next.scale[token] * kNormedInputFactor;
    const Real16x2 low = ToReals(residual.x * weight[0] * scale, residual.y * weight[1] * scale);
    const Real16x2 high = ToReals(residual.z * weight[2] * scale, residual.w * weight[3] * scale);
    Real16* to = p.next.x + p.next.order.Index(token, column, p.hidden);
    *reinterpret_cast<Real16x2*>(to) = low;
    *reinterpret_cast<Real16x2*>(to + 2) = high;
  }
  float square = residual.x * residual.x + residual.y * residual.y + residual.z * residual.z +
                 residual.w * residual.w;
#pragma unroll
  for (int32_t offset = 16; offset > 0; offset /= 2) {
    square += __shfl_xor_sync(0xffffffffu, square, offset);
  }
  if (thread % 32 == 0) squares[thread / 32] = square;
  __syncthreads();
  if (thread != 0) return;
  float total = 0;
  for (const float part : squares) total += part;
  p.next.square_sums[block] = total;  // [token][part]
}

__global__ void __launch_bounds__(kRowThreads)
    AddPartialKernel(const __grid_constant__ AddPartialParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int64_t at = 4 * (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x);
  if (at >= p.count) return;
  float4 value;
  if (p.partial_half != nullptr) {
    const float2 low = ToFloats(*reinterpret_cast<const Real16x2*>(p.partial_half + at));
    const float2 high = ToFloats(*reinterpret_cast<const Real16x2*>(p.partial_half + at + 2));
    value = make_float4(low.x, low.y, high.x, high.y);
  } else {
    value = *reinterpret_cast<const float4*>(p.partial_float + at);
  }
  float4 residual = *reinterpret_cast<float4*>(p.residual + at);
  residual.x += value.x;
  residual.y += value.y;
  residual.z += value.z;
  residual.w += value.w;
  *reinterpret_cast<float4*>(p.residual + at) = residual;
}

}  // namespace

cudaError_t AllReduceAdd(const AllReduceAddParams& params, const LaunchOptions& options) {
  const int32_t blocks = params.tokens * ExchangeParts(params.hidden);
  if (blocks > params.exchange.blocks_max || params.exchange.ranks > kPeersMax) {
    return cudaErrorInvalidValue;
  }
  return LaunchKernel(AllReduceAddKernel,
                      {.grid = dim3(static_cast<uint32_t>(blocks)),
                       .block = dim3(kThreads),
                       .stream = options.stream,
                       .dependent = options.dependent},
                      params);
}

cudaError_t AddPartial(const AddPartialParams& params, const LaunchOptions& options) {
  const int64_t blocks = (params.count / 4 + kRowThreads - 1) / kRowThreads;
  return LaunchKernel(AddPartialKernel,
                      {.grid = dim3(static_cast<uint32_t>(blocks)),
                       .block = dim3(kRowThreads),
                       .stream = options.stream,
                       .dependent = options.dependent},
                      params);
}

}  // namespace nibble::cuda::NIBBLE_ELEMENT
