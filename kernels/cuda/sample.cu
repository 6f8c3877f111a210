// Compiled without contraction of products and sums (-fmad=false).
#include "kernels/cuda/sample.h"

#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/sample_math.cuh"

namespace nibble::cuda {
namespace {

constexpr int32_t kThreads = 512;
constexpr int32_t kWarps = kThreads / 32;
constexpr int32_t kLoads = 8;            // of a thread, in flight
constexpr int32_t kTokensOfPart = 4096;  // that a block is worth
constexpr int32_t kRowsCut = 16;         // of more, a block has one for itself

using Best = SamplePart;

__device__ __forceinline__ void Take(Best* best, const Best& other) {
  best->non_finite |= other.non_finite;
  TakeBetter(best, other, [](Best* a, const Best& b) {
    a->score = b.score;
    a->token_id = b.token_id;
  });
}

__device__ __forceinline__ Best WarpBest(Best best) {
#pragma unroll
  for (int32_t offset = 16; offset > 0; offset /= 2) {
    Take(&best, {__shfl_xor_sync(0xffffffffu, best.score, offset),
                 __shfl_xor_sync(0xffffffffu, best.token_id, offset),
                 __shfl_xor_sync(0xffffffffu, best.non_finite, offset)});
  }
  return best;
}

// The best over the block, on every thread.
__device__ Best BlockBest(Best best) {
  __shared__ Best parts[kWarps];
  best = WarpBest(best);
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = best;
  __syncthreads();
  return WarpBest(threadIdx.x % 32 < kWarps ? parts[threadIdx.x % 32] : Best{});
}

// Calls take(token, logit) for the thread's tokens in [begin, end), by rising token, many loads at
// a time. `begin` is a multiple of four, and with kVector so is the row's place in memory.
template <bool kVector, typename TakeLogit>
__device__ __forceinline__ void ForLogits(const float* logits, int32_t begin, int32_t end,
                                          const TakeLogit& take) {
  constexpr int32_t kWide = kVector ? 4 : 1;
  for (int32_t first = begin + static_cast<int32_t>(threadIdx.x) * kWide; first < end;
       first += kThreads * kWide * kLoads) {
    float loaded[kLoads][kWide];
#pragma unroll
    for (int32_t i = 0; i < kLoads; ++i) {
      const int32_t token = first + i * kThreads * kWide;
      if (token >= end) continue;
      if constexpr (kVector) {
        *reinterpret_cast<float4*>(loaded[i]) = *reinterpret_cast<const float4*>(logits + token);
      } else {
        loaded[i][0] = logits[token];
      }
    }
#pragma unroll
    for (int32_t i = 0; i < kLoads; ++i) {
      const int32_t token = first + i * kThreads * kWide;
      if (token >= end) continue;
#pragma unroll
      for (int32_t j = 0; j < kWide; ++j) take(token + j, loaded[i][j]);
    }
  }
}

template <bool kVector>
__device__ Best BestOfTokens(const float* logits, const SampleRow& row, int32_t begin,
                             int32_t end) {
  Best best;
  float largest = -INFINITY;
  ForLogits<kVector>(logits, begin, end, [&](int32_t token, float logit) {
    if (!(logit < INFINITY)) best.non_finite = 1;
    if (logit > largest) {
      largest = logit;
      best.token_id = token;
    }
  });
  best.score = largest;
  best = BlockBest(best);
  if (row.inverse_temperature <= 0 || best.non_finite != 0 || best.token_id < 0) return best;
  // The likeliest token's score is a floor: most tokens cannot reach it whatever their gumbel.
  __shared__ uint64_t bounds[kGumbelBounds];
  FillGumbelBounds(bounds);
  __syncthreads();
  Best sampled;
  sampled.token_id = best.token_id;
  sampled.score = best.score * row.inverse_temperature + Gumbel(row.stream, best.token_id);
  ForLogits<kVector>(logits, begin, end, [&](int32_t token, float logit) {
    const double scaled = static_cast<double>(logit) * row.inverse_temperature;
    const double gap = sampled.score - scaled;
    if (gap > kGumbelMax) return;
    const uint64_t bits = UniformBits(row.stream, token);
    if (StaysBehind(gap, bits, bounds)) return;
    Take(&sampled, {scaled + GumbelFromBits(bits), token, 0});
  });
  return BlockBest(sampled);
}

// Whether this block is the last of its row's; then, on warp 0, `best` is the row's.
__device__ bool MeetOthers(const SampleParams& p, int32_t index, int32_t parts, Best* best) {
  if (parts == 1) return true;
  Best* places = p.scratch->parts + index * parts;
  uint32_t arrived = 0;
  if (threadIdx.x == 0) {
    places[blockIdx.y] = *best;
    __threadfence();
    arrived = atomicAdd(&p.scratch->arrived[index], 1u);
    __threadfence();
  }
  arrived = __shfl_sync(0xffffffffu, arrived, 0);
  __syncwarp();
  if (threadIdx.x >= 32 || arrived + 1 != static_cast<uint32_t>(parts)) return false;
  const auto lane = static_cast<int32_t>(threadIdx.x);
  Best mine;
  if (lane < parts) {
    const volatile Best* place = places + lane;
    mine = {place->score, place->token_id, place->non_finite};
  }
  *best = WarpBest(mine);
  if (lane == 0) p.scratch->arrived[index] = 0;
  return true;
}

__global__ void __launch_bounds__(kThreads) SampleKernel(const __grid_constant__ SampleParams p) {
  WaitForPreviousKernel();
  LetNextKernelStart();
  const auto index = static_cast<int32_t>(blockIdx.x), parts = static_cast<int32_t>(gridDim.y);
  const float* logits = p.logits + static_cast<int64_t>(index) * p.vocab_size;
  const SampleRow row = p.rows[index];
  const int32_t fours = (p.vocab_size + 3) / 4;
  const auto part = static_cast<int32_t>(blockIdx.y);
  const auto begin = static_cast<int32_t>(static_cast<int64_t>(fours) * part / parts * 4);
  const int32_t end =
      min(static_cast<int32_t>(static_cast<int64_t>(fours) * (part + 1) / parts * 4), p.vocab_size);
  Best best = p.vocab_size % 4 == 0 ? BestOfTokens<true>(logits, row, begin, end)
                                    : BestOfTokens<false>(logits, row, begin, end);
  if (!MeetOthers(p, index, parts, &best)) return;
  if (threadIdx.x == 0) {
    p.sampled[index] = {best.token_id, best.non_finite};
    p.last_tokens[row.slot] = best.token_id < 0 ? 0 : best.token_id;
  }
}

// Blocks of a row: more than one where rows are few and long.
int32_t PartsOf(const SampleParams& params) {
  if (params.scratch == nullptr || params.count > kRowsCut) return 1;
  const int32_t worth = (params.vocab_size + kTokensOfPart - 1) / kTokensOfPart;
  const int32_t room = SampleScratch::kParts / params.count;
  return std::max(1, std::min({worth, room, kSamplePartsMax}));
}

}  // namespace

cudaError_t Sample(const SampleParams& params, const LaunchOptions& options) {
  return LaunchKernel(
      SampleKernel,
      {.grid = dim3(static_cast<uint32_t>(params.count), static_cast<uint32_t>(PartsOf(params))),
       .block = dim3(kThreads),
       .stream = options.stream,
       .dependent = options.dependent},
      params);
}

}  // namespace nibble::cuda
