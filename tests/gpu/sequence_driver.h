// Steps of sequences on any executor: keeps block tables and positions as a scheduler would.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "base/check.h"
#include "worker/step/executor.h"

namespace nibble::gpu_check {

// Errors of the executor are fatal.
class SequenceDriver {
 public:
  explicit SequenceDriver(step::Executor* executor) : executor_(executor) {
    for (int32_t block = executor->limits().kv_blocks; block > 0; --block) {
      free_blocks_.push_back(block - 1);
    }
  }

  // What the next step does; in the order of the calls.
  void Open(int32_t slot, const std::vector<int32_t>& prompt, const step::SamplingParams& sampling,
            uint64_t seed = 0) {
    step::SlotSetup setup;
    setup.slot = slot;
    setup.seed = seed;
    setup.sampling = sampling;
    setup.history = prompt;
    setup.prompt_count = static_cast<int32_t>(prompt.size());
    plan_.opened.push_back(setup);
    sequences_[slot] = {};
  }
  void OpenGreedy(int32_t slot, const std::vector<int32_t>& prompt = {}) {
    Open(slot, prompt, {.temperature = 0});
  }
  void Close(int32_t slot) {
    Sequence& sequence = sequences_.at(slot);
    free_blocks_.insert(free_blocks_.end(), sequence.blocks.rbegin(), sequence.blocks.rend());
    sequences_.erase(slot);
    plan_.closed.push_back(slot);
  }
  void Feed(int32_t slot, std::span<const int32_t> tokens, int32_t sample_rows,
            int32_t logprobs = -1) {
    step::SequenceStep& next = Add(slot, static_cast<int32_t>(tokens.size()));
    next.sample_count = sample_rows;
    next.draft_count = std::max(0, sample_rows - 1);
    next.logprobs = logprobs;
    plan_.token_ids.insert(plan_.token_ids.end(), tokens.begin(), tokens.end());
  }
  void FeedSampled(int32_t slot, int32_t logprobs = -1) {
    step::SequenceStep& next = Add(slot, 1);
    next.feed_sampled = true;
    next.sample_count = 1;
    next.logprobs = logprobs;
    plan_.token_ids.push_back(-1);
  }
  void Launch() {
    plan_.step_id = ++steps_;
    const absl::Status status = executor_->Launch(plan_);
    CHECK_MSG(status.ok(), status.ToString());
    plan_.Clear();
  }
  [[nodiscard]] step::StepResult Wait() {
    step::StepResult result;
    const absl::Status status = executor_->Wait(Deadline::max(), &result);
    CHECK_MSG(status.ok(), status.ToString());
    return result;
  }
  [[nodiscard]] step::StepResult Run() {
    Launch();
    return Wait();
  }

 private:
  struct Sequence {
    int32_t position = 0;
    std::vector<int32_t> blocks;
  };

  step::SequenceStep& Add(int32_t slot, int32_t tokens) {
    Sequence& sequence = sequences_.at(slot);
    step::SequenceStep next;
    next.slot = slot;
    next.first_position = sequence.position;
    next.token_begin = static_cast<int32_t>(plan_.token_ids.size());
    next.token_count = tokens;
    next.block_table_index = static_cast<int32_t>(sequence.blocks.size());
    next.block_begin = static_cast<int32_t>(plan_.block_ids.size());
    sequence.position += tokens;
    while (static_cast<int32_t>(sequence.blocks.size()) * step::kBlockTokens < sequence.position) {
      CHECK(!free_blocks_.empty());
      sequence.blocks.push_back(free_blocks_.back());
      plan_.block_ids.push_back(free_blocks_.back());
      free_blocks_.pop_back();
      ++next.block_count;
    }
    plan_.sequences.push_back(next);
    return plan_.sequences.back();
  }

  step::Executor* const executor_;
  step::StepPlan plan_;
  uint64_t steps_ = 0;
  std::map<int32_t, Sequence> sequences_;
  std::vector<int32_t> free_blocks_;
};

}  // namespace nibble::gpu_check
