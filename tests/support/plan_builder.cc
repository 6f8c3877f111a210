#include "tests/support/plan_builder.h"

#include <algorithm>

#include "base/check.h"

namespace nibble::testing {

PlanBuilder::PlanBuilder(int32_t kv_blocks) {
  for (int32_t block = kv_blocks; block > 0; --block) free_blocks_.push_back(block - 1);
}

void PlanBuilder::Open(const step::SlotSetup& setup) {
  CHECK(sequences_.count(setup.slot) == 0);
  sequences_[setup.slot] = {};
  plan_.opened.push_back(setup);
}

void PlanBuilder::Open(int32_t slot, const std::vector<int32_t>& prompt,
                       const step::SamplingParams& sampling, uint64_t seed) {
  step::SlotSetup setup;
  setup.slot = slot;
  setup.seed = seed;
  setup.sampling = sampling;
  setup.history = prompt;
  setup.prompt_count = static_cast<int32_t>(prompt.size());
  Open(setup);
}

void PlanBuilder::OpenGreedy(int32_t slot, const std::vector<int32_t>& prompt) {
  step::SamplingParams greedy;
  greedy.temperature = 0;
  Open(slot, prompt, greedy);
}

void PlanBuilder::Close(int32_t slot) {
  // Blocks may be used again at once: steps run in order.
  Sequence& sequence = sequences_.at(slot);
  free_blocks_.insert(free_blocks_.end(), sequence.blocks.rbegin(), sequence.blocks.rend());
  sequences_.erase(slot);
  plan_.closed.push_back(slot);
}

step::SequenceStep& PlanBuilder::AddSequence(int32_t slot, int32_t tokens) {
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

void PlanBuilder::Feed(int32_t slot, std::span<const int32_t> tokens, int32_t sample_rows,
                       int32_t logprobs) {
  step::SequenceStep& sequence = AddSequence(slot, static_cast<int32_t>(tokens.size()));
  sequence.sample_count = sample_rows;
  sequence.draft_count = std::max(0, sample_rows - 1);
  sequence.logprobs = logprobs;
  plan_.token_ids.insert(plan_.token_ids.end(), tokens.begin(), tokens.end());
}

void PlanBuilder::FeedSampled(int32_t slot, int32_t logprobs) {
  step::SequenceStep& sequence = AddSequence(slot, 1);
  sequence.feed_sampled = true;
  sequence.sample_count = 1;
  sequence.logprobs = logprobs;
  plan_.token_ids.push_back(-1);
}

const step::StepPlan& PlanBuilder::Finished() {
  plan_.step_id = ++steps_;
  return plan_;
}

}  // namespace nibble::testing
