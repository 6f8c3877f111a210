#include "tests/support/in_process_group.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "tests/support/must.h"

namespace nibble::testing {

InProcessGroup::InProcessGroup(const std::string& folder, const Options& options)
    : InProcessGroup(Must(weights::Checkpoint::Open(folder)), options) {}

InProcessGroup::InProcessGroup(const weights::Checkpoint& checkpoint, const Options& options)
    : InProcessGroup(checkpoint, Must(execution::LocalGroup::Create(checkpoint, options))) {}

InProcessGroup::InProcessGroup(std::unique_ptr<weights::Checkpoint> owned, const Options& options)
    : InProcessGroup(*owned, options) {
  owned_ = std::move(owned);
}

InProcessGroup::InProcessGroup(const weights::Checkpoint& checkpoint,
                               std::unique_ptr<execution::LocalGroup> group)
    : PlanBuilder(group->limits().kv_blocks), checkpoint_(&checkpoint), group_(std::move(group)) {}

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

void InProcessGroup::Launch() {
  const absl::Status status = group_->Launch(Finished());
  CHECK_MSG(status.ok(), status.ToString());
  StartNext();
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
