// How long sampling of a step takes, the plain kernel's and what stands behind it for rows that ask
// for more, and what the host would take for one of them. Needs a GPU.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "base/check.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/sample_whole.h"
#include "kernels/cuda/token_counts.h"
#include "tests/gpu/comparison.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/graph_timer.h"
#include "worker/execution/cpu/row_sampler.h"
#include "worker/execution/cuda/whole_rows.h"

namespace nibble::cuda {
namespace {

using execution::RowSampler;
using execution::WholeRows;

struct Timed {
  const char* name;
  step::SamplingParams params;
  int32_t logprobs;
  bool masked;
};

// Sampling of `count` rows in a graph of twenty launches, and what the host would take for a row.
void Time(int32_t vocab, int32_t count, const Timed& timed) {
  constexpr int32_t kLaunches = 20;
  const step::ExecutorLimits limits{.vocab_size = vocab,
                                    .max_context = 1024,
                                    .max_slots = count,
                                    .max_step_tokens = count,
                                    .kv_blocks = 1};
  WholeRows rows(limits);
  rows.Clear();
  step::StepPlan plan;
  plan.token_ids.assign(1, 0);
  plan.mask_stride = execution::MaskWords(vocab);
  plan.mask_words.assign(static_cast<size_t>(plan.mask_stride) * static_cast<size_t>(count),
                         0xffffffffu);
  std::vector<SampleRow> plain;
  bool is_plain = false;
  for (int32_t slot = 0; slot < count; ++slot) {
    step::SlotSetup setup;
    setup.slot = slot;
    setup.seed = static_cast<uint64_t>(slot);
    setup.sampling = timed.params;
    for (int32_t i = 0; i < 300; ++i)
      setup.history.push_back(static_cast<int32_t>(Random()() % static_cast<uint32_t>(vocab)));
    CHECK(rows.Open(setup).ok());
    step::SequenceStep sequence;
    sequence.slot = slot;
    sequence.token_count = sequence.sample_count = 1;
    sequence.logprobs = timed.logprobs;
    if (timed.masked) sequence.mask = step::MaskSource::kHere;
    is_plain = rows.IsPlain(sequence, 0);
    if (!is_plain) rows.Add(plan, sequence, slot, 300);
    const float temperature = timed.params.temperature;
    plain.push_back({.stream = static_cast<uint64_t>(slot),
                     .inverse_temperature =
                         is_plain && temperature > 0 ? 1.0 / static_cast<double>(temperature) : 0,
                     .slot = slot});
  }
  const WholeRows::Lists& lists = rows.lists();
  const auto size = static_cast<size_t>(count) * static_cast<size_t>(vocab);
  const std::vector<float> host_logits = Normal(size, 2.5f);
  const DeviceArray<float> logits(host_logits);
  const DeviceArray<SampleRow> plain_rows(plain);
  const DeviceArray<WholeRow> whole_rows(lists.rows.empty() ? std::vector<WholeRow>(1)
                                                            : lists.rows);
  const DeviceArray<uint32_t> masks(plan.mask_words);
  const DeviceArray<TokenCount> counts(size);
  const DeviceArray<int32_t> last_tokens(static_cast<size_t>(count));
  const DeviceArray<SampledToken> sampled(static_cast<size_t>(count));
  const DeviceArray<RowLogprobs> logprobs(static_cast<size_t>(count));
  const DeviceArray<SampleScratch> scratch(std::vector<SampleScratch>(1));
  const DeviceArray<int32_t> tokens(lists.history_tokens.empty() ? std::vector<int32_t>(1)
                                                                 : lists.history_tokens);
  if (!lists.histories.empty()) {
    const DeviceArray<SlotHistory> histories(lists.histories);
    CUDA_OK(CountHistories({.slots = histories.get(),
                            .count = count,
                            .tokens = tokens.get(),
                            .vocab_size = vocab,
                            .counts = counts.get()},
                           {}));
    CUDA_OK(cudaDeviceSynchronize());
  }
  cudaStream_t stream = nullptr;
  CUDA_OK(cudaStreamCreate(&stream));
  const GraphTimes times = TimeGraph(stream, 3, 20, [&] {
    for (int32_t i = 0; i < kLaunches; ++i) {
      CUDA_OK(Sample({.logits = logits.get(),
                      .rows = plain_rows.get(),
                      .count = count,
                      .vocab_size = vocab,
                      .sampled = sampled.get(),
                      .last_tokens = last_tokens.get(),
                      .scratch = scratch.get()},
                     {.stream = stream}));
      if (is_plain) continue;
      CUDA_OK(SampleWhole({.logits = logits.get(),
                           .rows = whole_rows.get(),
                           .count = count,
                           .vocab_size = vocab,
                           .masks = masks.get(),
                           .counts = counts.get(),
                           .sampled = sampled.get(),
                           .last_tokens = last_tokens.get(),
                           .logprobs = logprobs.get()},
                          true, {.stream = stream}));
    }
  });
  CUDA_OK(cudaStreamDestroy(stream));
  double host_us = 0;
  if (!is_plain) {
    RowSampler sampler(vocab);
    std::vector<float> row(host_logits.begin(), host_logits.begin() + vocab);
    execution::RowRequest request{.params = &timed.params, .seed = 1};
    const auto begin = std::chrono::steady_clock::now();
    static_cast<void>(sampler.Sample(request, row));
    host_us =
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
  }
  std::printf("%6d tokens x %3d rows, %-28s %7.2f us a step; host %7.0f us a row\n", vocab, count,
              timed.name, times.median_us / kLaunches, host_us);
}

void TimeAll() {
  const step::SamplingParams greedy{.temperature = 0};
  const step::SamplingParams warm{.temperature = 0.8f};
  const step::SamplingParams top_p{.temperature = 0.8f, .top_p = 0.9f};
  const step::SamplingParams usual{.temperature = 0.8f, .top_p = 0.9f, .repetition_penalty = 1.1f};
  const step::SamplingParams top_k{.temperature = 0.8f, .top_k = 40};
  const step::SamplingParams all{.temperature = 0.8f,
                                 .top_p = 0.9f,
                                 .min_p = 0.05f,
                                 .typical_p = 0.95f,
                                 .top_k = 50,
                                 .repetition_penalty = 1.1f};
  const step::SamplingParams penalties{.temperature = 0, .repetition_penalty = 1.1f};
  for (const int32_t vocab : {32000, 128256}) {
    for (const int32_t count : {1, 64}) {
      for (const Timed& timed :
           {Timed{"greedy", greedy, -1, false}, Timed{"temperature", warm, -1, false},
            Timed{"greedy, penalties", penalties, -1, false}, Timed{"top_p", top_p, -1, false},
            Timed{"top_p, penalties", usual, -1, false}, Timed{"top_k", top_k, -1, false},
            Timed{"all filters, penalties", all, -1, false},
            Timed{"greedy, mask", greedy, -1, true},
            Timed{"temperature, 5 logprobs", warm, 5, false}}) {
        Time(vocab, count, timed);
      }
    }
  }
}

}  // namespace
}  // namespace nibble::cuda

int main() {
  nibble::cuda::TimeAll();
  return 0;
}
