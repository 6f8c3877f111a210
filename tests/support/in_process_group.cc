#include "tests/support/in_process_group.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"

namespace nibble::testing {
namespace {

template <typename T>
T Must(absl::StatusOr<T> made) {
  CHECK_MSG(made.ok(), made.status().ToString());
  return std::move(*made);
}

}  // namespace

InProcessGroup::InProcessGroup(const std::string& folder, const Options& options)
    : owned_(Must(weights::Checkpoint::Open(folder))),
      checkpoint_(owned_.get()),
      group_(Must(execution::LocalGroup::Create(*checkpoint_, options))) {
  for (int32_t block = group_->limits().kv_blocks; block > 0; --block) {
    free_blocks_.push_back(block - 1);
  }
}

InProcessGroup::InProcessGroup(const weights::Checkpoint& checkpoint, const Options& options)
    : checkpoint_(&checkpoint), group_(Must(execution::LocalGroup::Create(checkpoint, options))) {
  for (int32_t block = group_->limits().kv_blocks; block > 0; --block) {
    free_blocks_.push_back(block - 1);
  }
}

void InProcessGroup::KeepLogits() {
  logits_.resize(static_cast<size_t>(group_->size()));
  for (int32_t rank = 0; rank < group_->size(); ++rank) {
    group_->rank(rank).set_logits_observer(
        [this, rank](int32_t slot, int32_t position, std::span<const float> logits) {
          logits_[static_cast<size_t>(rank)][{slot, position}].assign(logits.begin(), logits.end());
        });
  }
}

const std::vector<float>& InProcessGroup::Logits(int32_t slot, int32_t position) const {
  const auto found = logits_[0].find({slot, position});
  CHECK(found != logits_[0].end());
  for (const auto& other : logits_) {
    const std::vector<float>& row = other.at({slot, position});
    CHECK(std::memcmp(row.data(), found->second.data(), row.size() * sizeof(float)) == 0);
  }
  return found->second;
}

void InProcessGroup::Open(const step::SlotSetup& setup) {
  CHECK(sequences_.count(setup.slot) == 0);
  sequences_[setup.slot] = {};
  plan_.opened.push_back(setup);
}

void InProcessGroup::Open(int32_t slot, const std::vector<int32_t>& prompt,
                          const step::SamplingParams& sampling, uint64_t seed) {
  step::SlotSetup setup;
  setup.slot = slot;
  setup.seed = seed;
  setup.sampling = sampling;
  setup.history = prompt;
  setup.prompt_count = static_cast<int32_t>(prompt.size());
  Open(setup);
}

void InProcessGroup::OpenGreedy(int32_t slot, const std::vector<int32_t>& prompt) {
  step::SamplingParams greedy;
  greedy.temperature = 0;
  Open(slot, prompt, greedy);
}

void InProcessGroup::Close(int32_t slot) {
  // Blocks may be used again at once: steps run in order.
  Sequence& sequence = sequences_.at(slot);
  free_blocks_.insert(free_blocks_.end(), sequence.blocks.rbegin(), sequence.blocks.rend());
  sequences_.erase(slot);
  plan_.closed.push_back(slot);
}

step::SequenceStep& InProcessGroup::AddSequence(int32_t slot, int32_t tokens) {
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

void InProcessGroup::Feed(int32_t slot, std::span<const int32_t> tokens, int32_t sample_rows,
                          int32_t logprobs) {
  step::SequenceStep& sequence = AddSequence(slot, static_cast<int32_t>(tokens.size()));
  sequence.sample_count = sample_rows;
  sequence.draft_count = std::max(0, sample_rows - 1);
  sequence.logprobs = logprobs;
  plan_.token_ids.insert(plan_.token_ids.end(), tokens.begin(), tokens.end());
}

void InProcessGroup::FeedSampled(int32_t slot, int32_t logprobs) {
  step::SequenceStep& sequence = AddSequence(slot, 1);
  sequence.feed_sampled = true;
  sequence.sample_count = 1;
  sequence.logprobs = logprobs;
  plan_.token_ids.push_back(-1);
}

void InProcessGroup::Launch() {
  plan_.step_id = ++steps_;
  const absl::Status status = group_->Launch(plan_);
  CHECK_MSG(status.ok(), status.ToString());
  plan_.Clear();
}

step::StepResult InProcessGroup::Wait() {
  step::StepResult result;
  const absl::Status status = group_->Wait(Deadline::max(), &result);
  CHECK_MSG(status.ok(), status.ToString());
  return result;
}

void InProcessGroup::Prefill(int32_t slot, std::span<const int32_t> prompt, int32_t chunk) {
  CHECK(chunk > 0);
  size_t begin = 0;
  while (begin + 1 < prompt.size()) {
    const size_t count = std::min(static_cast<size_t>(chunk), prompt.size() - 1 - begin);
    Feed(slot, prompt.subspan(begin, count), 0);
    static_cast<void>(Run());
    begin += count;
  }
}

InProcessGroup::Generation InProcessGroup::Generate(const Request& request) {
  Open(request.slot, request.prompt, request.sampling, request.seed);
  Prefill(request.slot, request.prompt, request.chunk);
  Feed(request.slot, std::span(request.prompt).last(1), 1, request.logprobs);
  Generation generation;
  for (int32_t i = 0; i < request.count; ++i) {
    if (i > 0) FeedSampled(request.slot, request.logprobs);
    const step::StepResult result = Run();
    CHECK(result.tokens.size() == 1);
    generation.tokens.push_back(result.tokens[0].token_id);
    generation.logprobs.push_back(result.tokens[0].logprob);
  }
  Close(request.slot);
  return generation;
}

}  // namespace nibble::testing
