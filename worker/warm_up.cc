#include "worker/warm_up.h"

#include <algorithm>

#include "base/status.h"
#include "worker/step/step_plan.h"

namespace nibble::worker {
namespace {

constexpr int32_t kPromptTokens = 64;

// One sequence on slot 0.
class Sequence {
 public:
  Sequence(step::Executor* executor, step::PlanPublisher* publisher, const Clock& clock,
           Deadline deadline)
      : executor_(executor), publisher_(publisher), clock_(clock), deadline_(deadline) {}

  // Opens the slot and runs the whole prompt; how long that took.
  absl::StatusOr<Duration> Prefill(int32_t tokens) {
    plan_.Clear();
    if (open_) plan_.closed.push_back(0);
    open_ = true;
    step::SlotSetup setup;
    setup.slot = 0;
    setup.sampling.temperature = 0;
    setup.history.assign(static_cast<size_t>(tokens), 0);
    setup.prompt_count = tokens;
    plan_.opened.push_back(std::move(setup));
    plan_.token_ids.assign(static_cast<size_t>(tokens), 0);
    step::SequenceStep row = {.first_position = 0, .token_count = tokens, .sample_count = 1};
    row.block_count = tokens / step::kBlockTokens + 1;  // room for the token after the prompt
    for (int32_t block = 0; block < row.block_count; ++block) plan_.block_ids.push_back(block);
    plan_.sequences.push_back(row);
    return Run();
  }

  absl::StatusOr<Duration> Decode(int32_t position) {
    plan_.Clear();
    plan_.token_ids.push_back(-1);
    plan_.sequences.push_back(
        {.first_position = position, .token_count = 1, .feed_sampled = true, .sample_count = 1});
    return Run();
  }

  absl::Status Close() {
    plan_.Clear();
    plan_.closed.push_back(0);
    return Run().status();
  }

 private:
  absl::StatusOr<Duration> Run() {
    const Deadline begin = clock_.Now();
    plan_.step_id = ++step_id_;
    if (publisher_ != nullptr) RETURN_IF_ERROR(publisher_->Publish(plan_));
    RETURN_IF_ERROR(executor_->Launch(plan_));
    RETURN_IF_ERROR(executor_->Wait(deadline_, &result_));
    for (const step::SampledSequence& sampled : result_.sequences) {
      if (sampled.non_finite) return absl::DataLossError("the model's logits are not finite");
    }
    return clock_.Now() - begin;
  }

  step::Executor* const executor_;
  step::PlanPublisher* const publisher_;
  const Clock& clock_;
  const Deadline deadline_;
  bool open_ = false;
  uint64_t step_id_ = 0;
  step::StepPlan plan_;
  step::StepResult result_;
};

}  // namespace

absl::StatusOr<WarmUpResult> WarmUp(step::Executor* executor, step::PlanPublisher* publisher,
                                    const Clock& clock, const WarmUpOptions& options) {
  const step::ExecutorLimits& limits = executor->limits();
  const int32_t room = std::min(limits.max_context, limits.kv_blocks * step::kBlockTokens);
  const int32_t tokens = std::clamp(std::min(room - 1, limits.max_step_tokens), 1, kPromptTokens);
  Sequence sequence(executor, publisher, clock, options.deadline);
  RETURN_IF_ERROR(sequence.Prefill(tokens).status());  // touches every page for the first time
  ASSIGN_OR_RETURN(const Duration taken, sequence.Prefill(tokens));
  if (tokens < room) RETURN_IF_ERROR(sequence.Decode(tokens).status());
  RETURN_IF_ERROR(sequence.Close());

  WarmUpResult result;
  const double seconds = std::max(1e-6, std::chrono::duration<double>(taken).count());
  result.prefill_tokens_per_second = tokens / seconds;
  const double chunk = std::min<double>(
      limits.max_step_tokens,
      result.prefill_tokens_per_second * std::chrono::duration<double>(options.chunk_time).count());
  const int32_t blocks = static_cast<int32_t>(chunk) / step::kBlockTokens;
  result.prefill_chunk_tokens =
      std::min(limits.max_step_tokens, std::max(1, blocks) * step::kBlockTokens);
  return result;
}

}  // namespace nibble::worker
