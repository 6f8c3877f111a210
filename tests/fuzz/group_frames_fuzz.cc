// Bytes as what machines of one group say to each other: a machine writes its own ranks' states and
// nothing else, and a plan reaches the ring only as the one wire form of what it says.
#include <google/protobuf/stubs/logging.h>
#include <nibble/worker/v1/group.pb.h>

#include <cstdint>
#include <memory>
#include <string>

#include "base/check.h"
#include "worker/group/plan_relay.h"
#include "worker/group/rank_mirror.h"
#include "worker/step/plan_codec.h"

namespace nibble::group {
namespace {

constexpr RankRange kOwn = {.first = 2, .count = 2};

// Takes what the ring would take.
class Ring final : public step::PlanPublisher {
 public:
  explicit Ring(const std::string& bytes) : bytes_(bytes) {}
  absl::Status Publish(const step::StepPlan& plan) override { return Check(plan); }
  absl::Status Publish(const step::MaskBatch& masks) override { return Check(masks); }
  absl::Status Stop() override { return absl::OkStatus(); }

 private:
  template <typename Message>
  absl::Status Check(const Message& message) const {
    std::string again(step::EncodedSize(message), '\0');
    CHECK(step::Encode(message, std::as_writable_bytes(std::span<char>(again))).ok());
    CHECK(again == bytes_);
    return absl::OkStatus();
  }
  const std::string& bytes_;
};

void TryBeat(const worker::v1::Beat& beat) {
  auto control = std::make_unique<GroupControl>();
  auto stats = std::make_unique<step::GroupStats>();
  const absl::Status status = ApplyRanks(beat, kOwn, control.get(), stats.get());
  for (int32_t rank = 0; rank < step::kMaxRanks; ++rank) {
    const RankSlot& slot = control->ranks[static_cast<size_t>(rank)];
    CHECK(slot.phase.load() <= RankPhase::kServing);
    CHECK(slot.kv_blocks >= 0 && slot.load_bytes_done >= 0 && slot.load_bytes_total >= 0);
    if (status.ok() && kOwn.Contains(rank)) continue;
    CHECK(slot.phase.load() == RankPhase::kStarting && slot.model_hash == 0);
    CHECK(stats->ranks[static_cast<size_t>(rank)].up.Get() == 0);
  }
}

void TryPlan(const worker::v1::PlanRecord& record) {
  Ring ring(record.bytes());
  PlanDeliverer deliverer(&ring);
  bool stop = false;
  (void)deliverer.Deliver(record, &stop);
}

}  // namespace
}  // namespace nibble::group

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const google::protobuf::LogSilencer silent;
  nibble::worker::v1::JoinRequest request;
  if (request.ParseFromArray(data, static_cast<int>(size))) {
    nibble::group::TryBeat(request.beat());
    (void)nibble::group::FactsOf(request.hello());
  }
  nibble::worker::v1::JoinResponse response;
  if (response.ParseFromArray(data, static_cast<int>(size))) {
    nibble::group::TryBeat(response.beat());
    nibble::group::TryPlan(response.plan());
  }
  return 0;
}
