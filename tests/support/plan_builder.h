// Step plans as a scheduler would make them: keeps block tables and positions. What runs the plans
// derives from this, and adds how they are launched.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "worker/step/step_plan.h"

namespace nibble::testing {

class PlanBuilder {
 public:
  // What the next step does; in the order of the calls.
  void Open(const step::SlotSetup& setup);
  void Open(int32_t slot, const std::vector<int32_t>& prompt, const step::SamplingParams& sampling,
            uint64_t seed = 0);
  void OpenGreedy(int32_t slot, const std::vector<int32_t>& prompt = {});
  void Close(int32_t slot);
  // The next input tokens of the slot's sequence, of which the last `sample_rows` are sampled (all
  // but the first of these count as drafts).
  void Feed(int32_t slot, std::span<const int32_t> tokens, int32_t sample_rows,
            int32_t logprobs = -1);
  // One token: the one sampled last.
  void FeedSampled(int32_t slot, int32_t logprobs = -1);

  // Edits of the step being built that the calls above do not cover.
  [[nodiscard]] step::StepPlan& plan() { return plan_; }

 protected:
  explicit PlanBuilder(int32_t kv_blocks);
  ~PlanBuilder() = default;

  // The step as built, numbered. StartNext() once it has been launched.
  [[nodiscard]] const step::StepPlan& Finished();
  void StartNext() { plan_.Clear(); }

 private:
  struct Sequence {
    int32_t position = 0;  // of the next input token
    std::vector<int32_t> blocks;
  };

  step::SequenceStep& AddSequence(int32_t slot, int32_t tokens);

  step::StepPlan plan_;
  uint64_t steps_ = 0;
  std::map<int32_t, Sequence> sequences_;  // open slots
  std::vector<int32_t> free_blocks_;
};

}  // namespace nibble::testing
