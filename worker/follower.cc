#include "worker/follower.h"

#include "base/status.h"

namespace nibble::worker {
namespace {

class Follower {
 public:
  Follower(step::PlanReceiver* receiver, step::Executor* executor, const FollowerOptions& options)
      : receiver_(receiver), executor_(executor), options_(options) {}

  absl::Status Run() {
    for (;;) {
      Stamp();
      const absl::StatusOr<step::PlanMessage> message =
          receiver_->Receive(options_.clock->Now() + options_.idle_stamp, &plan_, &masks_);
      if (absl::IsDeadlineExceeded(message.status())) {
        // Nothing comes behind the last step: its faults would stay unseen.
        RETURN_IF_ERROR(WaitDownTo(0));
        continue;
      }
      RETURN_IF_ERROR(message.status());
      switch (*message) {
        case step::PlanMessage::kStop:
          return WaitDownTo(0);
        case step::PlanMessage::kMasks:
          RETURN_IF_ERROR(executor_->ProvideMasks(masks_));
          break;
        case step::PlanMessage::kStep:
          RETURN_IF_ERROR(WaitDownTo(1));
          RETURN_IF_ERROR(executor_->Launch(plan_));
          ++in_flight_;
          break;
      }
    }
  }

 private:
  absl::Status WaitDownTo(int in_flight) {
    while (in_flight_ > in_flight) {
      const Duration patience =
          options_.serving() ? options_.step_deadline : options_.warm_up_deadline;
      RETURN_IF_ERROR(executor_->Wait(options_.clock->Now() + patience, &result_));
      --in_flight_;
    }
    return absl::OkStatus();
  }

  void Stamp() {
    options_.stats->progress_ns.Set(options_.clock->Now().time_since_epoch().count());
  }

  step::PlanReceiver* const receiver_;
  step::Executor* const executor_;
  const FollowerOptions options_;
  int in_flight_ = 0;
  step::StepPlan plan_;
  step::MaskBatch masks_;
  step::StepResult result_;
};

}  // namespace

absl::Status RunFollower(step::PlanReceiver* receiver, step::Executor* executor,
                         const FollowerOptions& options) {
  return Follower(receiver, executor, options).Run();
}

}  // namespace nibble::worker
