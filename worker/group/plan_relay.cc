#include "worker/group/plan_relay.h"

#include <span>

#include "base/status.h"
#include "worker/step/crc32c.h"
#include "worker/step/plan_codec.h"

namespace nibble::group {
namespace {

using worker::v1::PlanRecord;

template <typename Message>
absl::Status EncodeTo(const Message& message, PlanRecord* record) {
  std::string* bytes = record->mutable_bytes();
  bytes->resize(step::EncodedSize(message));
  const auto view = std::as_writable_bytes(std::span<char>(bytes->data(), bytes->size()));
  RETURN_IF_ERROR(step::Encode(message, view).status());
  record->set_crc32c(step::Crc32c(view));
  return absl::OkStatus();
}

}  // namespace

absl::Status PlanSender::Next(Deadline deadline, PlanRecord* record) {
  ASSIGN_OR_RETURN(const step::PlanMessage kind, from_->Receive(deadline, &plan_, &masks_));
  switch (kind) {
    case step::PlanMessage::kStep:
      record->set_kind(PlanRecord::KIND_STEP);
      return EncodeTo(plan_, record);
    case step::PlanMessage::kMasks:
      record->set_kind(PlanRecord::KIND_MASKS);
      return EncodeTo(masks_, record);
    case step::PlanMessage::kStop:
      break;
  }
  record->set_kind(PlanRecord::KIND_STOP);
  record->clear_bytes();
  record->set_crc32c(0);
  return absl::OkStatus();
}

absl::Status PlanDeliverer::Deliver(const PlanRecord& record, bool* stop) {
  const auto bytes =
      std::as_bytes(std::span<const char>(record.bytes().data(), record.bytes().size()));
  if (step::Crc32c(bytes) != record.crc32c()) {
    return absl::DataLossError("a plan of another machine has a wrong checksum");
  }
  switch (record.kind()) {
    case PlanRecord::KIND_STEP:
      RETURN_IF_ERROR(step::Decode(bytes, &plan_));
      return to_->Publish(plan_);
    case PlanRecord::KIND_MASKS:
      RETURN_IF_ERROR(step::Decode(bytes, &masks_));
      return to_->Publish(masks_);
    case PlanRecord::KIND_STOP:
      *stop = true;
      return to_->Stop();
    default:
      return absl::DataLossError("a plan of another machine is of no known kind");
  }
}

}  // namespace nibble::group
