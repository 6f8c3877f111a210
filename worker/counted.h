// An executor and a communicator that count what goes through them into a rank's statistics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "base/clock.h"
#include "worker/collectives/communicator.h"
#include "worker/step/executor.h"
#include "worker/step/group_stats.h"

namespace nibble::worker {

// Arguments are borrowed; threads as the wrapped one.
class CountedExecutor final : public step::Executor {
 public:
  CountedExecutor(step::Executor* executor, const Clock* clock, step::RankStats* stats)
      : executor_(executor), clock_(clock), stats_(stats) {}

  [[nodiscard]] absl::Status Launch(const step::StepPlan& plan) override {
    return executor_->Launch(plan);
  }
  [[nodiscard]] absl::Status ProvideMasks(const step::MaskBatch& masks) override {
    return executor_->ProvideMasks(masks);
  }
  [[nodiscard]] absl::Status Wait(Deadline deadline, step::StepResult* result) override {
    const absl::Status status = executor_->Wait(deadline, result);
    if (status.ok()) {
      stats_->steps.Add(1);
      stats_->progress_ns.Set(clock_->Now().time_since_epoch().count());
    }
    return status;
  }
  [[nodiscard]] const step::ExecutorLimits& limits() const override { return executor_->limits(); }

 private:
  step::Executor* const executor_;
  const Clock* const clock_;
  step::RankStats* const stats_;
};

class CountedCommunicator final : public collectives::Communicator {
 public:
  CountedCommunicator(collectives::Communicator* communicator, step::RankStats* stats)
      : communicator_(communicator), stats_(stats) {}

  [[nodiscard]] int32_t rank() const override { return communicator_->rank(); }
  [[nodiscard]] int32_t size() const override { return communicator_->size(); }
  [[nodiscard]] absl::Status AllReduceSum(std::span<float> data) override {
    stats_->collective_bytes.Add(data.size_bytes());
    return communicator_->AllReduceSum(data);
  }
  [[nodiscard]] absl::Status AllGather(std::span<const std::byte> mine,
                                       std::span<std::byte> all) override {
    stats_->collective_bytes.Add(mine.size());
    return communicator_->AllGather(mine, all);
  }
  [[nodiscard]] absl::Status Broadcast(std::span<std::byte> data, int32_t root) override {
    if (root == rank()) stats_->collective_bytes.Add(data.size());
    return communicator_->Broadcast(data, root);
  }
  [[nodiscard]] absl::Status AllReduceAddNorm(const AddNorm& args) override {
    stats_->collective_bytes.Add(args.partial.size_bytes());
    return communicator_->AllReduceAddNorm(args);
  }
  void Abort() override { communicator_->Abort(); }

 private:
  collectives::Communicator* const communicator_;
  step::RankStats* const stats_;
};

}  // namespace nibble::worker
