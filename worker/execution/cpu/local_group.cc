#include "worker/execution/cpu/local_group.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "worker/collectives/self_communicator.h"

namespace nibble::execution {

absl::StatusOr<std::unique_ptr<LocalGroup>> LocalGroup::Create(
    const weights::Checkpoint& checkpoint, const Options& options) {
  std::unique_ptr<LocalGroup> group(new LocalGroup);
  weights::MemoryOptions memory = options.memory;
  memory.threads = options.threads;
  ASSIGN_OR_RETURN(group->plan_, weights::PlanMemory(checkpoint, options.ranks, memory));
  if (options.ranks > 1) {
    ASSIGN_OR_RETURN(auto region, collectives::ShmRegion::Create(options.ranks));
    group->region_ = std::make_unique<collectives::ShmRegion>(std::move(region));
  }
  for (int32_t rank = 0; rank < options.ranks; ++rank) {
    if (options.ranks == 1) {
      group->communicators_.push_back(collectives::MakeSelfCommunicator());
    } else {
      ASSIGN_OR_RETURN(
          auto communicator,
          collectives::MakeShmCommunicator(group->region_.get(), rank,
                                           {.waiting_threads = options.ranks * options.threads}));
      group->communicators_.push_back(std::move(communicator));
    }
    ASSIGN_OR_RETURN(auto executor, CpuExecutor::Create(checkpoint, group->plan_,
                                                        group->communicators_.back().get(),
                                                        {.memory = memory,
                                                         .threads = options.threads,
                                                         .isa = options.isa,
                                                         .progress = {},
                                                         .on_progress_stamp = {}}));
    group->executors_.push_back(std::move(executor));
  }
  return group;
}

LocalGroup::~LocalGroup() {
  // A step in flight must not wait for a rank that is gone already.
  for (const auto& communicator : communicators_) communicator->Abort();
}

absl::Status LocalGroup::Launch(const step::StepPlan& plan) {
  for (const auto& executor : executors_) RETURN_IF_ERROR(executor->Launch(plan));
  return absl::OkStatus();
}

absl::Status LocalGroup::ProvideMasks(const step::MaskBatch& masks) {
  for (const auto& executor : executors_) RETURN_IF_ERROR(executor->ProvideMasks(masks));
  return absl::OkStatus();
}

absl::Status LocalGroup::Wait(Deadline deadline, step::StepResult* result) {
  RETURN_IF_ERROR(executors_[0]->Wait(deadline, result));
  const auto same = [](const step::TokenLogprob& a, const step::TokenLogprob& b) {
    return a.token_id == b.token_id && a.logprob == b.logprob;
  };
  for (size_t rank = 1; rank < executors_.size(); ++rank) {
    RETURN_IF_ERROR(executors_[rank]->Wait(deadline, &other_));
    if (!std::equal(result->tokens.begin(), result->tokens.end(), other_.tokens.begin(),
                    other_.tokens.end(), same) ||
        !std::equal(result->top_logprobs.begin(), result->top_logprobs.end(),
                    other_.top_logprobs.begin(), other_.top_logprobs.end(), same)) {
      return absl::InternalError(
          absl::StrCat("ranks 0 and ", rank, " sampled differently in step ", result->step_id));
    }
  }
  return absl::OkStatus();
}

const step::ExecutorLimits& LocalGroup::limits() const { return executors_[0]->limits(); }

}  // namespace nibble::execution
