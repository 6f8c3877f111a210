// The leader's plans between machines: a record of the plan ring as a message, and back.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "nibble/worker/v1/group.pb.h"
#include "worker/step/plan_channel.h"

namespace nibble::group {

// The first machine's end. One thread.
class PlanSender {
 public:
  // Borrowed.
  explicit PlanSender(step::PlanReceiver* from) : from_(from) {}

  // Waits for the leader's next record. DEADLINE_EXCEEDED where there is none by then; else the
  // receiver's error.
  [[nodiscard]] absl::Status Next(Deadline deadline, worker::v1::PlanRecord* record);

 private:
  step::PlanReceiver* const from_;
  step::StepPlan plan_;
  step::MaskBatch masks_;
};

// The other machines' end. One thread.
class PlanDeliverer {
 public:
  // Borrowed.
  explicit PlanDeliverer(step::PlanPublisher* to) : to_(to) {}

  // DATA_LOSS where the record does not check out; else the publisher's error. *stop: it was the
  // last.
  [[nodiscard]] absl::Status Deliver(const worker::v1::PlanRecord& record, bool* stop);

 private:
  step::PlanPublisher* const to_;
  step::StepPlan plan_;
  step::MaskBatch masks_;
};

}  // namespace nibble::group
