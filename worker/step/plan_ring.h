// Plans from the leader to the other ranks of its machine: a ring in shared memory with one writer
// and a cursor per reader.
//
// The memory is a memfd: CreatePlanRing makes it (the supervisor does), each rank attaches to the
// descriptor it inherited, and nothing is left behind when all of them die. A record is
//
//   u32 length of the bytes, u32 kind, u64 step id, u32 CRC-32C of all that and the bytes, u32 0,
//   bytes (worker/step/plan_codec.h), padding to 8
//
// The ring is mapped twice in a row, so a record never wraps. Whoever waits spins at most
// PlanRingWait::spin, then sleeps on a futex. The two sides trust nothing in the shared memory
// that they did not write themselves: what does not check out is DATA_LOSS, and the group ends.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/step/plan_channel.h"

namespace nibble::step {

struct PlanRingOptions {
  int32_t readers = 1;                        // 1 … kMaxRanks
  size_t ring_bytes = size_t{16} << 20;       // a power of two, at least a page
  size_t record_bytes_max = size_t{4} << 20;  // of a record's bytes; at most a quarter of the ring
};

// Makes the memory and returns its descriptor (close-on-exec, size sealed), which the caller owns.
// INVALID_ARGUMENT for options out of range, RESOURCE_EXHAUSTED when there is no memory.
[[nodiscard]] absl::StatusOr<int> CreatePlanRing(const PlanRingOptions& options);

struct PlanRingWait {
  const Clock* clock = nullptr;  // borrowed
  // Spinning pays only while each waiting thread has a core; 0 where ranks outnumber cores.
  Duration spin = std::chrono::microseconds(20);
};

struct PlanRingHeader;

// One process's view of the memory. The descriptor may be closed once this is attached.
class PlanRingMapping {
 public:
  // INVALID_ARGUMENT when the descriptor is no plan ring.
  [[nodiscard]] static absl::StatusOr<PlanRingMapping> Attach(int fd);
  PlanRingMapping(PlanRingMapping&& other) noexcept;
  PlanRingMapping& operator=(PlanRingMapping&&) = delete;
  ~PlanRingMapping();

  [[nodiscard]] PlanRingHeader* header() const { return header_; }
  // Where the byte of stream position `position` lies; ring_bytes() bytes from there on are valid.
  [[nodiscard]] std::byte* At(uint64_t position) const {
    return data_ + (position & (ring_bytes_ - 1));
  }
  [[nodiscard]] int32_t readers() const { return readers_; }
  [[nodiscard]] size_t ring_bytes() const { return ring_bytes_; }
  [[nodiscard]] size_t record_bytes_max() const { return record_bytes_max_; }

 private:
  PlanRingMapping() = default;

  PlanRingHeader* header_ = nullptr;
  std::byte* data_ = nullptr;
  // Read once, checked, and never looked up in the shared memory again.
  size_t ring_bytes_ = 0;
  size_t record_bytes_max_ = 0;
  int32_t readers_ = 0;
};

// The leader's end. One thread.
class PlanRingWriter final : public PlanPublisher {
 public:
  // A Publish that finds no room for `step_deadline` is DEADLINE_EXCEEDED and names the reader.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<PlanRingWriter>> Attach(
      int fd, Duration step_deadline, PlanRingWait wait);

  // RESOURCE_EXHAUSTED: the plan is larger than a record may be.
  [[nodiscard]] absl::Status Publish(const StepPlan& plan) override;
  [[nodiscard]] absl::Status Publish(const MaskBatch& masks) override;
  [[nodiscard]] absl::Status Stop() override;  // any number of times; the first one counts

 private:
  PlanRingWriter(PlanRingMapping ring, Duration step_deadline, PlanRingWait wait)
      : ring_(std::move(ring)), step_deadline_(step_deadline), wait_(wait) {}
  template <typename Message>
  absl::Status PublishMessage(PlanMessage kind, const Message& message);
  absl::Status WaitForRoom(size_t bytes);
  absl::StatusOr<uint64_t> SlowestCursor(int32_t* reader) const;
  void Finish(PlanMessage kind, uint64_t step_id, size_t length);

  PlanRingMapping ring_;
  Duration step_deadline_;
  PlanRingWait wait_;
  uint64_t written_ = 0;  // stream position; the shared cursor only repeats it
  bool stopped_ = false;
};

// A follower's end. One thread.
class PlanRingReader final : public PlanReceiver {
 public:
  // `reader` is 0 … readers - 1; each index is used by one rank.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<PlanRingReader>> Attach(int fd,
                                                                              int32_t reader,
                                                                              PlanRingWait wait);

  // An error other than DEADLINE_EXCEEDED stays: every later call returns it too.
  [[nodiscard]] absl::StatusOr<PlanMessage> Receive(Deadline deadline, StepPlan* plan,
                                                    MaskBatch* masks) override;

 private:
  PlanRingReader(PlanRingMapping ring, int32_t reader, PlanRingWait wait)
      : ring_(std::move(ring)), reader_(reader), wait_(wait) {}
  absl::Status WaitForRecord(Deadline deadline);
  absl::StatusOr<PlanMessage> ReadRecord(StepPlan* plan, MaskBatch* masks);

  PlanRingMapping ring_;
  int32_t reader_;
  PlanRingWait wait_;
  uint64_t read_ = 0;       // stream position
  uint64_t available_ = 0;  // bytes known to be written beyond read_
  absl::Status failed_;
};

}  // namespace nibble::step
