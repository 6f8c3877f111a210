// A tensor-parallel group in the test's own process, and the steps of sequences on it: keeps block
// tables and positions as a scheduler would, and the logits that the ranks saw.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/plan_builder.h"
#include "worker/execution/cpu/local_group.h"
#include "worker/step/step_plan.h"
#include "worker/weights/checkpoint.h"

namespace nibble::testing {

// Failures of the group are fatal for the test (CHECK).
class InProcessGroup : public PlanBuilder {
 public:
  using Options = execution::LocalGroup::Options;

  // Opens the checkpoint in `folder`.
  InProcessGroup(const std::string& folder, const Options& options);
  // Uses a checkpoint that outlives this.
  InProcessGroup(const weights::Checkpoint& checkpoint, const Options& options);

  [[nodiscard]] execution::LocalGroup& group() { return *group_; }
  [[nodiscard]] const weights::Checkpoint& checkpoint() const { return *checkpoint_; }

  // Keeps the logits of every row sampled from here on (each rank's copy must be the same).
  void KeepLogits();
  // Of the row at `position` of `slot`, as last seen.
  [[nodiscard]] const std::vector<float>& Logits(int32_t slot, int32_t position) const;

  void Launch();
  [[nodiscard]] step::StepResult Wait();
  [[nodiscard]] step::StepResult Run() {
    Launch();
    return Wait();
  }

  // A request alone: opens the slot, feeds the prompt in chunks, generates and closes the slot.
  struct Generation {
    std::vector<int32_t> tokens;
    std::vector<float> logprobs;
  };
  struct Request {
    int32_t slot = 0;
    std::vector<int32_t> prompt;
    step::SamplingParams sampling = {};
    uint64_t seed = 0;
    int32_t count = 1;
    int32_t chunk = 512;
    int32_t logprobs = -1;
  };
  [[nodiscard]] Generation Generate(const Request& request);

  // Feeds `prompt` but its last token, `chunk` tokens a step.
  void Prefill(int32_t slot, std::span<const int32_t> prompt, int32_t chunk);

 private:
  InProcessGroup(std::unique_ptr<weights::Checkpoint> owned, const Options& options);
  InProcessGroup(const weights::Checkpoint& checkpoint,
                 std::unique_ptr<execution::LocalGroup> group);

  std::unique_ptr<weights::Checkpoint> owned_;
  const weights::Checkpoint* checkpoint_ = nullptr;
  std::unique_ptr<execution::LocalGroup> group_;
  // One map per rank: each observer writes on its own thread.
  std::vector<std::map<std::pair<int32_t, int32_t>, std::vector<float>>> logits_;
};

}  // namespace nibble::testing
