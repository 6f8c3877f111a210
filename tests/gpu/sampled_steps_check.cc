// Sequences with every kind of wish side by side on the GPU executor: their tokens and logprobs are
// those that the host's sampler takes from the same logits, and the same again one step ahead, with
// masks that come late. Needs a GPU.
//
//   sampled_steps_check MODEL_SPECS_FOLDER
#include <array>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "tests/gpu/sequence_driver.h"
#include "tests/support/must.h"
#include "worker/execution/cpu/penalties.h"
#include "worker/execution/cpu/row_sampler.h"
#include "worker/execution/cuda/cuda_executor.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/rank_weights.h"

namespace nibble::gpu_check {
namespace {

using execution::CudaExecutor;
using execution::CudaModel;
using testing::Must;

constexpr int32_t kSteps = 24;
constexpr int32_t kReopened = 10;  // the step before which a sequence is preempted

struct Wish {
  step::SamplingParams params;
  int32_t logprobs = -1;
  bool late_mask = false;
  int32_t min_tokens = 0;  // of the stop ids 1, 2, 3
};

std::vector<Wish> Wishes() {
  std::vector<Wish> wishes(7);
  wishes[0].params = {.temperature = 0};
  wishes[1].params = {.temperature = 0.9f};
  wishes[2].params = {.temperature = 0, .frequency_penalty = 0.7f, .repetition_penalty = 1.3f};
  wishes[3].params = {.temperature = 0.8f, .top_p = 0.9f, .repetition_penalty = 1.1f};
  wishes[3].logprobs = 3;
  wishes[4].params = {.temperature = 1.2f, .min_p = 0.02f, .typical_p = 0.9f, .top_k = 30};
  wishes[4].params.logit_bias = {{.token_id = 5, .bias = 3}, {.token_id = 9, .bias = -100}};
  wishes[4].min_tokens = 12;
  wishes[5].params = {.temperature = 0.7f, .presence_penalty = 1};
  wishes[5].late_mask = true;
  wishes[6].params = {.temperature = 0};
  wishes[6].logprobs = 20;
  wishes[6].late_mask = true;
  return wishes;
}

// What a run has given: tokens by slot, and what was said of each.
struct Said {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  bool operator==(const Said&) const = default;
};

class Run {
 public:
  Run(CudaExecutor* executor, int32_t vocab_size)
      : executor_(executor),
        driver_(executor),
        wishes_(Wishes()),
        said_(wishes_.size()),
        sampler_(vocab_size),
        counts_(static_cast<int32_t>(wishes_.size()), vocab_size),
        vocab_size_(vocab_size) {}

  // Every step waited for, its tokens held to the host's from the logits that were seen.
  int32_t Observed() {
    std::map<int32_t, std::vector<float>> logits;  // by slot
    executor_->set_logits_observer([&](int32_t slot, int32_t, std::span<const float> row) {
      logits[slot].assign(row.begin(), row.end());
    });
    int32_t wrong = 0;
    for (int32_t step = 0; step < kSteps; ++step) {
      Feed(step);
      driver_.Launch();
      ProvideMasks(step);
      Take(driver_.Wait());
      for (size_t i = 0; i < wishes_.size(); ++i) {
        if (!AsTheHost(i, step, logits.at(static_cast<int32_t>(i)))) ++wrong;
      }
    }
    CloseAll();
    executor_->set_logits_observer(nullptr);
    return wrong;
  }

  // One step ahead of the results, and of the masks.
  void Ahead() {
    Feed(0);
    driver_.Launch();
    for (int32_t step = 1; step < kSteps; ++step) {
      if (step == kReopened) {  // its history must be known
        ProvideMasks(step - 1);
        Take(driver_.Wait());
        Feed(step);
        driver_.Launch();
        continue;
      }
      Feed(step);
      driver_.Launch();
      ProvideMasks(step - 1);
      Take(driver_.Wait());
    }
    ProvideMasks(kSteps - 1);
    Take(driver_.Wait());
    CloseAll();
  }

  [[nodiscard]] const std::vector<Said>& said() const { return said_; }

 private:
  void Open(int32_t slot, const std::vector<int32_t>& outputs) {
    const Wish& wish = wishes_[static_cast<size_t>(slot)];
    step::SlotSetup setup;
    setup.slot = slot;
    setup.seed = 77 + static_cast<uint64_t>(slot);
    setup.sampling = wish.params;
    setup.stop_ids = {1, 2, 3};
    setup.min_tokens = wish.min_tokens;
    setup.history = {3, 1, 4, 1, 5, 9, 2, 6};
    setup.prompt_count = static_cast<int32_t>(setup.history.size());
    setup.history.insert(setup.history.end(), outputs.begin(), outputs.end());
    counts_.Reset(slot, setup.history, setup.prompt_count);
    driver_.Open(setup);
    driver_.Feed(slot, setup.history, 1, wish.logprobs);
    driver_.plan().sequences.back().draft_count = 0;
  }

  void Feed(int32_t step) {
    for (size_t i = 0; i < wishes_.size(); ++i) {
      const auto slot = static_cast<int32_t>(i);
      if (step == 0) {
        Open(slot, {});
      } else if (step == kReopened && i == 3) {
        driver_.Close(slot);
        Open(slot, said_[i].tokens);
      } else {
        driver_.FeedSampled(slot, wishes_[i].logprobs);
      }
      if (wishes_[i].late_mask) {
        driver_.plan().sequences.back().mask = step::MaskSource::kLate;
      }
    }
  }

  // Every third token, begun differently by each row and step.
  [[nodiscard]] std::vector<uint32_t> Mask(size_t slot, int32_t step) const {
    std::vector<uint32_t> words(static_cast<size_t>((vocab_size_ + 31) / 32));
    for (auto id = (slot + static_cast<size_t>(step)) % 3; id < static_cast<size_t>(vocab_size_);
         id += 3) {
      words[id / 32] |= 1u << (id % 32);
    }
    return words;
  }

  void ProvideMasks(int32_t step) {
    step::MaskBatch masks;
    masks.step_id = ++masked_steps_;
    masks.mask_stride = (vocab_size_ + 31) / 32;
    for (size_t i = 0; i < wishes_.size(); ++i) {
      if (!wishes_[i].late_mask) continue;
      const std::vector<uint32_t> words = Mask(i, step);
      masks.mask_words.insert(masks.mask_words.end(), words.begin(), words.end());
    }
    const absl::Status status = executor_->ProvideMasks(masks);
    CHECK_MSG(status.ok(), status.ToString());
  }

  void Take(const step::StepResult& result) {
    CHECK(result.sequences.size() == wishes_.size());
    for (size_t i = 0; i < wishes_.size(); ++i) {
      const step::SampledSequence& sequence = result.sequences[i];
      CHECK(sequence.token_count == 1 && !sequence.non_finite);
      const auto& token = result.tokens[static_cast<size_t>(sequence.token_begin)];
      said_[i].tokens.push_back(token.token_id);
      said_[i].logprobs.push_back(token.logprob);
      for (int32_t k = 0; k < sequence.top_count; ++k) {
        const auto& top = result.top_logprobs[static_cast<size_t>(sequence.top_begin + k)];
        said_[i].logprobs.push_back(static_cast<float>(top.token_id));
        said_[i].logprobs.push_back(top.logprob);
      }
    }
  }

  bool AsTheHost(size_t i, int32_t step, const std::vector<float>& logits) {
    const Wish& wish = wishes_[i];
    const auto slot = static_cast<int32_t>(i);
    const bool penalized = execution::UsesPenalties(wish.params);
    const std::vector<uint32_t> mask = Mask(i, step);
    const std::vector<int32_t> stop_ids = {1, 2, 3};
    execution::RowRequest request{.params = &wish.params,
                                  .counts = penalized ? counts_.Row(slot) : nullptr,
                                  .mask = wish.late_mask ? mask.data() : nullptr};
    if (step < wish.min_tokens) request.forbidden = stop_ids;
    request.seed = 77 + static_cast<uint64_t>(slot);
    request.output_index = static_cast<uint64_t>(step);
    std::vector<float> work = logits;
    const int32_t want = sampler_.Sample(request, work).token_id;
    const int32_t got = said_[i].tokens.back();
    counts_.AddOutput(slot, got);
    bool same = want == got;
    if (wish.logprobs >= 0) {
      const double sum = sampler_.LogSumExp(logits);
      std::array<step::TokenLogprob, step::kMaxLogprobs> top;
      sampler_.TopLogprobs(logits, sum, wish.logprobs, top.data());
      std::vector<float> numbers = {
          static_cast<float>(static_cast<double>(logits[static_cast<size_t>(want)]) - sum)};
      for (int32_t k = 0; k < wish.logprobs; ++k) {
        numbers.push_back(static_cast<float>(top[static_cast<size_t>(k)].token_id));
        numbers.push_back(top[static_cast<size_t>(k)].logprob);
      }
      same = same && std::vector<float>(
                         said_[i].logprobs.end() - static_cast<std::ptrdiff_t>(numbers.size()),
                         said_[i].logprobs.end()) == numbers;
    }
    if (!same) std::printf("     slot %zu, step %d: got %d, want %d\n", i, step, got, want);
    return same;
  }

  void CloseAll() {
    for (size_t i = 0; i < wishes_.size(); ++i) driver_.Close(static_cast<int32_t>(i));
    static_cast<void>(driver_.Run());
  }

  CudaExecutor* const executor_;
  SequenceDriver driver_;
  const std::vector<Wish> wishes_;
  std::vector<Said> said_;
  execution::RowSampler sampler_;
  execution::PenaltyCounts counts_;
  const int32_t vocab_size_;
  uint64_t masked_steps_ = 0;
};

bool Check(const std::string& folder, bool graphs) {
  const auto checkpoint = Must(weights::Checkpoint::Open(folder));
  const auto shares = Must(weights::PlanShares(*checkpoint, 1));
  constexpr int32_t kContext = 48;
  auto model =
      Must(CudaModel::Load(*checkpoint, shares[0], kContext, cuda::Element::kHalf, nullptr));
  const int32_t vocab_size = model->spec().vocab_size;
  const auto executor = Must(CudaExecutor::Create(
      std::move(model),
      {.max_slots = 8, .max_step_tokens = 64, .kv_blocks = 40, .graphs = graphs}));
  Run observed(executor.get(), vocab_size), ahead(executor.get(), vocab_size);
  const int32_t wrong = observed.Observed();
  ahead.Ahead();
  const bool same = observed.said() == ahead.said();
  const bool ok = wrong == 0 && same;
  std::printf("%-4s sampled steps%s: %d tokens are not the host's; one step ahead %s\n",
              ok ? "ok" : "FAIL", graphs ? ", graphs" : "", wrong, same ? "the same" : "others");
  return ok;
}

}  // namespace
}  // namespace nibble::gpu_check

int main(int argc, char** argv) {
  using namespace nibble::gpu_check;
  if (argc < 2) {
    std::fprintf(stderr, "usage: sampled_steps_check MODEL_SPECS_FOLDER\n");
    return 2;
  }
  bool ok = true;
  for (const bool graphs : {true, false}) ok = Check(std::string(argv[1]) + "/llama", graphs) && ok;
  std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
  return ok ? 0 : 1;
}
