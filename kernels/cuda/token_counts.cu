#include "kernels/cuda/token_counts.h"

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/token_counts.h"

namespace nibble::cuda {
namespace {

constexpr int32_t kThreads = 1024;

__global__ void __launch_bounds__(kThreads)
    CountHistoriesKernel(const __grid_constant__ HistoryParams p) {
  const SlotHistory history = p.slots[blockIdx.x];
  TokenCount* counts = p.counts + static_cast<int64_t>(history.slot) * p.vocab_size;
  for (int32_t i = threadIdx.x; i < p.vocab_size; i += kThreads) counts[i] = 0;
  __syncthreads();
  for (int32_t i = threadIdx.x; i < history.count; i += kThreads) {
    TokenCount* count = counts + p.tokens[history.begin + i];
    const bool in_prompt = i < history.prompt_count;
    TokenCount seen = *reinterpret_cast<volatile TokenCount*>(count), next, found;
    do {
      found = seen;
      next = found;
      if (in_prompt) {
        next |= kInPrompt;
      } else {
        sampling::CountOutput(&next);
      }
      seen = atomicCAS(count, found, next);
    } while (seen != found);
  }
}

constexpr int32_t kDraftThreads = 128;

__global__ void __launch_bounds__(kDraftThreads)
    AcceptDraftsKernel(const __grid_constant__ DraftParams p) {
  const auto index = static_cast<int32_t>(blockIdx.x * kDraftThreads + threadIdx.x);
  if (index >= p.count) return;
  const DraftedSequence sequence = p.sequences[index];
  TokenCount* counts = p.counts + static_cast<int64_t>(sequence.slot) * p.vocab_size;
  for (int32_t i = 0; i <= sequence.draft_count; ++i) {
    const SampledToken token = p.sampled[sequence.row + i];
    if (token.non_finite != 0 || token.token_id < 0) return;
    p.last_tokens[sequence.slot] = token.token_id;
    if (sequence.penalized != 0) sampling::CountOutput(counts + token.token_id);
    if (i < sequence.draft_count && p.ids[sequence.draft_begin + i] != token.token_id) return;
  }
}

}  // namespace

cudaError_t CountHistories(const HistoryParams& params, const LaunchOptions& options) {
  return LaunchKernel(CountHistoriesKernel,
                      {.grid = dim3(static_cast<uint32_t>(params.count)),
                       .block = dim3(kThreads),
                       .stream = options.stream},
                      params);
}

cudaError_t AcceptDrafts(const DraftParams& params, const LaunchOptions& options) {
  const int32_t blocks = (params.count + kDraftThreads - 1) / kDraftThreads;
  return LaunchKernel(AcceptDraftsKernel,
                      {.grid = dim3(static_cast<uint32_t>(blocks)),
                       .block = dim3(kDraftThreads),
                       .stream = options.stream},
                      params);
}

}  // namespace nibble::cuda
