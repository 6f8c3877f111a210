// Compiled without contraction of products and sums (-fmad=false).
#include "kernels/cuda/sample.h"

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda {
namespace {

constexpr int32_t kThreads = 1024;
constexpr int32_t kWarps = kThreads / 32;
constexpr double kGumbelMax = 36.75;  // above -log(-log(1 - 2^-53))

// ln x with additions and multiplications in the order of worker/execution/cpu/portable_math.h.
__device__ __forceinline__ double PortableLog(double x) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(x));
  const int64_t exponent = static_cast<int64_t>(bits - kSqrtHalf) >> 52;
  const double m =
      __longlong_as_double(static_cast<int64_t>(bits - (static_cast<uint64_t>(exponent) << 52)));
  const double s = (m - 1.0) / (m + 1.0);
  const double s2 = s * s;
  double p = 1.0 / 19.0;
  p = p * s2 + 1.0 / 17.0;
  p = p * s2 + 1.0 / 15.0;
  p = p * s2 + 1.0 / 13.0;
  p = p * s2 + 1.0 / 11.0;
  p = p * s2 + 1.0 / 9.0;
  p = p * s2 + 1.0 / 7.0;
  p = p * s2 + 1.0 / 5.0;
  p = p * s2 + 1.0 / 3.0;
  p = p * s2 + 1.0;
  return static_cast<double>(exponent) * 0.69314718055994530942 + 2.0 * s * p;
}

// Element token_id of the SplitMix64 sequence from `stream`: 52 bits stand for (k + 1/2) / 2^52.
__device__ __forceinline__ double Gumbel(uint64_t stream, int32_t token_id) {
  uint64_t z =
      stream + (static_cast<uint64_t>(static_cast<uint32_t>(token_id)) + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  const double uniform = (static_cast<double>(z >> 12) + 0.5) * 0x1p-52;
  return -PortableLog(-PortableLog(uniform));
}

struct Best {
  double score = -1e300;
  int32_t token_id = -1;
  int32_t non_finite = 0;
};
__device__ __forceinline__ void Take(Best* best, double score, int32_t token_id) {
  if (token_id < 0) return;
  if (best->token_id < 0 || score > best->score ||
      (score == best->score && token_id < best->token_id)) {
    best->score = score;
    best->token_id = token_id;
  }
}

// The best over the block, on every thread.
__device__ Best BlockBest(Best best) {
  __shared__ Best parts[kWarps];
#pragma unroll
  for (int32_t offset = 16; offset > 0; offset /= 2) {
    const double score = __shfl_xor_sync(0xffffffffu, best.score, offset);
    const int32_t token_id = __shfl_xor_sync(0xffffffffu, best.token_id, offset);
    best.non_finite |= __shfl_xor_sync(0xffffffffu, best.non_finite, offset);
    Take(&best, score, token_id);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = best;
  __syncthreads();
  Best all = parts[0];
  for (int32_t warp = 1; warp < kWarps; ++warp) {
    Take(&all, parts[warp].score, parts[warp].token_id);
    all.non_finite |= parts[warp].non_finite;
  }
  return all;
}

__global__ void __launch_bounds__(kThreads) SampleKernel(const __grid_constant__ SampleParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const int32_t index = static_cast<int32_t>(blockIdx.x);
  const float* logits = p.logits + static_cast<int64_t>(index) * p.vocab_size;
  const SampleRow row = p.rows[index];
  Best best;
  float largest = -INFINITY;
  for (int32_t i = threadIdx.x; i < p.vocab_size; i += kThreads) {
    const float logit = logits[i];
    if (!(logit < INFINITY)) best.non_finite = 1;
    if (logit > largest) {
      largest = logit;
      best.token_id = i;
    }
  }
  best.score = largest;
  best = BlockBest(best);
  if (row.inverse_temperature > 0 && best.non_finite == 0 && best.token_id >= 0) {
    // The likeliest token's score is a floor: most tokens cannot reach it whatever their gumbel.
    Best sampled;
    sampled.token_id = best.token_id;
    sampled.score = best.score * row.inverse_temperature + Gumbel(row.stream, best.token_id);
    for (int32_t i = threadIdx.x; i < p.vocab_size; i += kThreads) {
      const double scaled = static_cast<double>(logits[i]) * row.inverse_temperature;
      if (sampled.score - scaled > kGumbelMax) continue;
      Take(&sampled, scaled + Gumbel(row.stream, i), i);
    }
    best = BlockBest(sampled);
  }
  if (threadIdx.x == 0) {
    p.sampled[index] = {best.token_id, best.non_finite};
    p.last_tokens[row.slot] = best.token_id < 0 ? 0 : best.token_id;
  }
}

}  // namespace

cudaError_t Sample(const SampleParams& params, const LaunchOptions& options) {
  return LaunchKernel(SampleKernel,
                      {.grid = dim3(static_cast<uint32_t>(params.count)),
                       .block = dim3(kThreads),
                       .stream = options.stream,
                       .dependent = options.dependent},
                      params);
}

}  // namespace nibble::cuda
