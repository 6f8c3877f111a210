// Holds the device's sampler to the host's, token by token and bit by bit, over logits of every
// kind and requests of every mixture, with penalties, drafts and masks. Needs a GPU.
//
//   sample_check [few]     few: for compute-sanitizer
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/sample_whole.h"
#include "kernels/cuda/token_counts.h"
#include "tests/gpu/comparison.h"
#include "tests/gpu/device_array.h"
#include "worker/execution/cpu/penalties.h"
#include "worker/execution/cpu/row_sampler.h"
#include "worker/execution/cuda/step_record.h"
#include "worker/execution/cuda/whole_rows.h"

namespace nibble::cuda {
namespace {

using execution::RowSampler;
using execution::WholeRows;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int32_t kHistory = 50;

int32_t Below(int32_t count) {
  return static_cast<int32_t>(Random()() % static_cast<uint32_t>(count));
}

template <typename T>
T AnyOf(const std::vector<T>& values) {
  return values[static_cast<size_t>(Below(static_cast<int32_t>(values.size())))];
}

// A row of logits: of the kinds that models give, and of those that only bad luck does.
std::vector<float> MakeLogits(int32_t vocab) {
  const int32_t kind = Below(12);
  std::vector<float> logits = Normal(static_cast<size_t>(vocab), kind == 1 ? 1e-4f : 3);
  const auto at = [&]() -> float& { return logits[static_cast<size_t>(Below(vocab))]; };
  for (float& logit : logits) {
    if (kind == 2) logit = std::round(logit * 2) / 2;  // many ties
    if (kind == 3) logit = 1.25f;                      // nothing but ties
    if (kind == 4 && Below(3) > 0) logit = -kInfinity;
    if (kind == 5) logit = -kInfinity;  // nothing is left, or one
    if (kind == 6) logit = logit * 12 - 200;
    if (kind == 7 && Below(2) == 0) logit = Below(2) == 0 ? 0.0f : -0.0f;
    if (kind == 8) logit = std::abs(logit) * 1e-3f + 9;
  }
  if (kind == 5 && Below(2) == 0) at() = 3;
  if (kind == 9) at() = std::numeric_limits<float>::quiet_NaN();
  if (kind == 10) at() = kInfinity;
  if (kind == 11) at() = 3e38f;
  return logits;
}

step::SamplingParams MakeParams(int32_t vocab) {
  step::SamplingParams params;
  params.temperature = AnyOf<float>({0, 0.1f, 0.7f, 1, 1.3f, 30});
  if (Below(2) == 0) params.top_k = AnyOf<int32_t>({1, 2, 40, 1500, vocab - 1, vocab, vocab + 1});
  if (Below(2) == 0) params.top_p = AnyOf<float>({0, 1e-6f, 0.3f, 0.9f, 0.999999f});
  if (Below(3) == 0) params.min_p = AnyOf<float>({1e-7f, 0.05f, 1});
  if (Below(4) == 0) params.typical_p = AnyOf<float>({1e-6f, 0.4f, 0.95f});
  if (Below(2) == 0) {
    params.repetition_penalty = AnyOf<float>({1, 1.1f, 0.01f, 10});
    params.presence_penalty = AnyOf<float>({0, 0.5f, -2});
    params.frequency_penalty = AnyOf<float>({0, 0.3f});
  }
  if (Below(3) == 0) {
    for (int32_t i = 0; i < 40; ++i) {
      params.logit_bias.push_back({.token_id = Below(vocab), .bias = AnyOf<float>({-100, 1, 5})});
    }
  }
  return params;
}

// Sequences with every mixture of wishes, sampled on the device and by the host.
class MixedSteps {
 public:
  MixedSteps(int32_t vocab, int32_t slots, bool clusters)
      : limits_{.vocab_size = vocab,
                .max_context = 4096,
                .max_slots = slots,
                .max_step_tokens = slots * 8,
                .kv_blocks = 1},
        clusters_(clusters),
        rows_(limits_),
        host_counts_(slots, vocab),
        sampler_(vocab),
        counts_(static_cast<size_t>(slots) * static_cast<size_t>(vocab)),
        last_tokens_(static_cast<size_t>(slots)) {
    for (int32_t slot = 0; slot < slots; ++slot) {
      step::SlotSetup setup;
      setup.slot = slot;
      setup.seed = Random()();
      setup.sampling = MakeParams(vocab);
      setup.prompt_count = Below(kHistory);
      for (int32_t i = 0; i < kHistory; ++i) setup.history.push_back(Below(vocab));
      for (int32_t i = 0; i < 3; ++i) setup.stop_ids.push_back(Below(vocab));
      setup.min_tokens = Below(2) * (kHistory - setup.prompt_count + 1);
      slots_.push_back({.setup = setup, .outputs = kHistory - setup.prompt_count});
      if (execution::UsesPenalties(setup.sampling)) {
        host_counts_.Reset(slot, setup.history, setup.prompt_count);
      }
    }
  }

  // How many rows differ.
  int32_t Run(int32_t step) {
    MakePlan(step);
    Launch(step == 0);
    return Compare();
  }
  [[nodiscard]] int32_t rows() const { return row_count_; }

 private:
  struct Slot {
    step::SlotSetup setup;
    int64_t outputs = 0;
  };

  void MakePlan(int32_t step) {
    plan_.Clear();
    rows_.Clear();
    logits_.clear();
    row_count_ = 0;
    const int32_t words = execution::MaskWords(limits_.vocab_size);
    late_masks_ = {};
    plan_.mask_stride = late_masks_.mask_stride = words + 1;
    for (Slot& slot : slots_) {
      if (step == 0) {
        const absl::Status opened = rows_.Open(slot.setup);
        CHECK_MSG(opened.ok(), opened.ToString());
      }
      step::SequenceStep sequence;
      sequence.slot = slot.setup.slot;
      sequence.token_begin = static_cast<int32_t>(plan_.token_ids.size());
      sequence.draft_count = Below(4) == 0 ? Below(7) : 0;
      sequence.token_count = sequence.sample_count = sequence.draft_count + 1;
      for (int32_t i = 0; i < sequence.token_count; ++i) {
        plan_.token_ids.push_back(Below(2) == 0 ? Below(3) : Below(limits_.vocab_size));
      }
      sequence.logprobs = Below(3) == 0 ? Below(std::min(20, limits_.vocab_size) + 1) : -1;
      sequence.mask = AnyOf<step::MaskSource>({step::MaskSource::kNone, step::MaskSource::kNone,
                                               step::MaskSource::kHere, step::MaskSource::kLate});
      AddMasks(sequence);
      plan_.sequences.push_back(sequence);
      rows_.Add(plan_, sequence, row_count_, slot.outputs);
      row_count_ += sequence.sample_count;
      for (int32_t i = 0; i < sequence.sample_count; ++i) {
        const std::vector<float> row = MakeLogits(limits_.vocab_size);
        logits_.insert(logits_.end(), row.begin(), row.end());
      }
    }
    CHECK(rows_.CheckSizes().ok());
  }

  void AddMasks(const step::SequenceStep& sequence) {
    if (sequence.mask == step::MaskSource::kNone) return;
    auto& words =
        sequence.mask == step::MaskSource::kHere ? plan_.mask_words : late_masks_.mask_words;
    const bool narrow = Below(2) == 0;
    for (int32_t i = 0; i < sequence.sample_count * plan_.mask_stride; ++i) {
      const auto word = static_cast<uint32_t>(Random()());
      words.push_back(narrow && Below(50) > 0 ? 0 : word);
    }
  }

  template <typename T>
  static std::vector<T> NotEmpty(std::vector<T> list) {
    if (list.empty()) list.resize(1);
    return list;
  }

  void Launch(bool opens) {
    const WholeRows::Lists& lists = rows_.lists();
    const DeviceArray<float> logits(logits_);
    const DeviceArray<WholeRow> rows(lists.rows);
    const DeviceArray<TokenBias> biases(NotEmpty(lists.biases));
    const DeviceArray<int32_t> ids(NotEmpty(lists.ids)), tokens(NotEmpty(lists.history_tokens));
    const DeviceArray<uint32_t> masks(NotEmpty(lists.mask_words));
    const DeviceArray<SlotHistory> histories(NotEmpty(lists.histories));
    const DeviceArray<DraftedSequence> drafted(NotEmpty(lists.drafted));
    execution::LateMasks late;
    std::vector<uint32_t> late_words(static_cast<size_t>(std::max(1, row_count_)) *
                                     static_cast<size_t>(late_masks_.mask_stride));
    late.set_memory(late_words);
    late.Expect(rows_.late_masks(), execution::MaskWords(limits_.vocab_size));
    if (rows_.late_masks() > 0) CHECK(late.Provide(late_masks_).ok());
    const DeviceArray<uint32_t> device_late(late_words);
    const DeviceArray<SampledToken> sampled(static_cast<size_t>(row_count_));
    const DeviceArray<RowLogprobs> logprobs(static_cast<size_t>(rows_.logprobs()) + 1);
    if (opens && !lists.histories.empty()) {
      CUDA_OK(CountHistories({.slots = histories.get(),
                              .count = static_cast<int32_t>(lists.histories.size()),
                              .tokens = tokens.get(),
                              .vocab_size = limits_.vocab_size,
                              .counts = counts_.get()},
                             {}));
    }
    // In two chunks, as rows of a large step are.
    const int32_t middle = row_count_ / 2;
    for (const auto& [begin, end] : {std::pair(0, middle), std::pair(middle, row_count_)}) {
      if (begin == end) continue;
      CUDA_OK(SampleWhole({.logits = logits.get() + int64_t{begin} * limits_.vocab_size,
                           .first_row = begin,
                           .rows = rows.get() + begin,
                           .count = end - begin,
                           .vocab_size = limits_.vocab_size,
                           .biases = biases.get(),
                           .ids = ids.get(),
                           .masks = masks.get(),
                           .late_masks = device_late.get(),
                           .counts = counts_.get(),
                           .sampled = sampled.get(),
                           .last_tokens = last_tokens_.get(),
                           .logprobs = logprobs.get()},
                          clusters_, {}));
    }
    if (!lists.drafted.empty()) {
      CUDA_OK(AcceptDrafts({.sequences = drafted.get(),
                            .count = static_cast<int32_t>(lists.drafted.size()),
                            .ids = ids.get(),
                            .vocab_size = limits_.vocab_size,
                            .sampled = sampled.get(),
                            .counts = counts_.get(),
                            .last_tokens = last_tokens_.get()},
                           {}));
    }
    CUDA_OK(cudaDeviceSynchronize());
    sampled_ = sampled.Get();
    logprobs_ = logprobs.Get();
    CHECK(std::memcmp(logits.Get().data(), logits_.data(), logits_.size() * 4) == 0);
  }

  int32_t Compare() {
    int32_t wrong = 0, row = 0;
    size_t here = 0, late = 0;  // words of masks
    for (const step::SequenceStep& sequence : plan_.sequences) {
      Slot& slot = slots_[static_cast<size_t>(sequence.slot)];
      const int32_t first = row;
      for (int32_t draft = 0; draft < sequence.sample_count; ++draft, ++row) {
        const uint32_t* mask = nullptr;
        if (sequence.mask == step::MaskSource::kHere) mask = plan_.mask_words.data() + here;
        if (sequence.mask == step::MaskSource::kLate) mask = late_masks_.mask_words.data() + late;
        if (sequence.mask == step::MaskSource::kHere)
          here += static_cast<size_t>(plan_.mask_stride);
        if (sequence.mask == step::MaskSource::kLate)
          late += static_cast<size_t>(plan_.mask_stride);
        if (!SameRow(sequence, slot, row, draft, mask)) ++wrong;
      }
      if (!Accept(sequence, &slot, first)) ++wrong;
    }
    return wrong;
  }

  bool SameRow(const step::SequenceStep& sequence, const Slot& slot, int32_t row, int32_t draft,
               const uint32_t* mask) {
    const auto vocab = static_cast<size_t>(limits_.vocab_size);
    const std::span<const float> raw(logits_.data() + static_cast<size_t>(row) * vocab, vocab);
    const std::span<const int32_t> drafts(plan_.token_ids.data() + sequence.token_begin + 1,
                                          static_cast<size_t>(draft));
    execution::RowRequest request{.params = &slot.setup.sampling, .mask = mask};
    const int64_t output = slot.outputs + draft;
    request.seed = slot.setup.seed;
    request.output_index = static_cast<uint64_t>(output);
    request.logprobs = sequence.logprobs;
    if (execution::UsesPenalties(slot.setup.sampling)) {
      request.counts = host_counts_.Row(sequence.slot);
      request.drafts = drafts;
    }
    if (output < slot.setup.min_tokens) request.forbidden = slot.setup.stop_ids;
    std::vector<float> work(raw.begin(), raw.end());
    const execution::Candidate want = sampler_.Sample(request, work);
    const SampledToken& got = sampled_[static_cast<size_t>(row)];
    bool same = got.token_id == want.token_id && got.non_finite == want.non_finite;
    if (same && sequence.logprobs >= 0 && want.token_id >= 0) {
      same = SameLogprobs(
          raw, want.token_id, sequence.logprobs,
          logprobs_[static_cast<size_t>(rows_.lists().rows[static_cast<size_t>(row)].logprob_row)]);
    }
    if (!same) {
      const step::SamplingParams& p = slot.setup.sampling;
      std::printf(
          "     row %d: got %d (%d), want %d (%d); T %g k %d p %g min %g typical %g "
          "penalties %d drafts %d mask %d logprobs %d biases %zu\n",
          row, got.token_id, got.non_finite, want.token_id, want.non_finite,
          static_cast<double>(p.temperature), p.top_k, static_cast<double>(p.top_p),
          static_cast<double>(p.min_p), static_cast<double>(p.typical_p),
          request.counts != nullptr ? 1 : 0, draft, static_cast<int>(sequence.mask),
          sequence.logprobs, p.logit_bias.size());
    }
    return same;
  }

  bool SameLogprobs(std::span<const float> raw, int32_t token, int32_t count,
                    const RowLogprobs& got) {
    const double log_sum_exp = sampler_.LogSumExp(raw);
    std::vector<step::TokenLogprob> top(static_cast<size_t>(count) + 1);
    sampler_.TopLogprobs(raw, log_sum_exp, count, top.data());
    const auto want =
        static_cast<float>(static_cast<double>(raw[static_cast<size_t>(token)]) - log_sum_exp);
    bool same = want == got.sampled;
    for (int32_t i = 0; i < count; ++i) {
      const step::TokenLogprob& entry = top[static_cast<size_t>(i)];
      same = same && entry.token_id == got.token_ids[i] && entry.logprob == got.logprobs[i];
    }
    return same;
  }

  // Takes the sequence's outputs, and compares what the device remembers of them.
  bool Accept(const step::SequenceStep& sequence, Slot* slot, int32_t first) {
    int32_t last = -1;
    for (int32_t i = 0; i < sequence.sample_count; ++i) {
      const SampledToken& token = sampled_[static_cast<size_t>(first + i)];
      if (token.non_finite != 0 || token.token_id < 0) break;
      last = token.token_id;
      ++slot->outputs;
      if (execution::UsesPenalties(slot->setup.sampling))
        host_counts_.AddOutput(sequence.slot, last);
      if (i < sequence.draft_count &&
          plan_.token_ids[static_cast<size_t>(sequence.token_begin + 1 + i)] != last) {
        break;
      }
    }
    const auto index = static_cast<size_t>(sequence.slot);
    bool same = last < 0 || last_tokens_.Get()[index] == last;
    if (execution::UsesPenalties(slot->setup.sampling)) {
      const auto vocab = static_cast<size_t>(limits_.vocab_size);
      std::vector<TokenCount> counts(vocab);
      CUDA_OK(cudaMemcpy(counts.data(), counts_.get() + index * vocab, vocab * sizeof(TokenCount),
                         cudaMemcpyDeviceToHost));
      same = same && std::equal(counts.begin(), counts.end(), host_counts_.Row(sequence.slot));
    }
    if (!same) std::printf("     slot %d: its counts or its last token differ\n", sequence.slot);
    return same;
  }

  const step::ExecutorLimits limits_;
  const bool clusters_;
  WholeRows rows_;
  execution::PenaltyCounts host_counts_;
  RowSampler sampler_;
  DeviceArray<TokenCount> counts_;
  DeviceArray<int32_t> last_tokens_;
  std::vector<Slot> slots_;
  step::StepPlan plan_;
  step::MaskBatch late_masks_;
  std::vector<float> logits_;
  int32_t row_count_ = 0;
  std::vector<SampledToken> sampled_;
  std::vector<RowLogprobs> logprobs_;
};

bool CheckMixed(int32_t vocab, int32_t slots, bool clusters, int32_t rounds) {
  int32_t wrong = 0, rows = 0;
  for (int32_t round = 0; round < rounds; ++round) {
    MixedSteps steps(vocab, slots, clusters);
    for (int32_t step = 0; step < 3; ++step) {
      wrong += steps.Run(step);
      rows += steps.rows();
    }
  }
  std::printf("%-4s %d mixed rows of %d tokens, %d slots%s: %d differ\n",
              wrong == 0 ? "ok" : "FAIL", rows, vocab, slots, clusters ? "" : ", a block a row",
              wrong);
  return wrong == 0;
}

bool CheckFew() {
  bool ok = CheckMixed(5, 7, true, 1);
  ok = CheckMixed(1001, 5, true, 1) && ok;
  ok = CheckMixed(33000, 1, true, 2) && ok;
  return CheckMixed(33000, 1, false, 1) && ok;
}

bool Check() {
  bool ok = true;
  for (const bool clusters : {true, false}) {
    ok = CheckMixed(5, 7, clusters, 20) && ok;
    ok = CheckMixed(1001, 9, clusters, 20) && ok;
    ok = CheckMixed(32000, 1, clusters, 12) && ok;
    ok = CheckMixed(32000, 40, clusters, 1) && ok;
    ok = CheckMixed(49153, 5, clusters, 2) && ok;
    ok = CheckMixed(128256, 2, clusters, 3) && ok;
  }
  ok = CheckMixed(32000, 170, true, 1) && ok;
  return ok;
}

}  // namespace
}  // namespace nibble::cuda

int main(int argc, char** argv) {
  const bool few = argc > 1 && std::strcmp(argv[1], "few") == 0;
  const bool ok = few ? nibble::cuda::CheckFew() : nibble::cuda::Check();
  std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
  return ok ? 0 : 1;
}
