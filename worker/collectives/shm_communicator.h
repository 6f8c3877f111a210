// Collectives among CPU ranks of one machine through one piece of shared memory.
//
// The supervisor creates the region (a memfd: nothing is left behind by a kill) and hands its
// descriptor to the ranks; threads of one process may share it as well.
//
// Every operation is a sequence of rounds. In a round each rank copies its bytes into its own
// slot, arrives, waits for all, and reads what it needs from all slots; slots are double-buffered,
// so one wait per round is enough. A sum is taken by every rank for itself, in rank order.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "worker/collectives/communicator.h"

namespace nibble::collectives {

inline constexpr int32_t kShmRanksMax = 64;
inline constexpr int64_t kShmSlotBytes = int64_t{1} << 20;

// Owns a descriptor and a mapping of the region. Movable; thread-safe but for destruction.
class ShmRegion {
 public:
  // A fresh region for `ranks` ranks; messages longer than slot_bytes travel in pieces. The
  // descriptor is close-on-exec. RESOURCE_EXHAUSTED when the memory cannot be had.
  [[nodiscard]] static absl::StatusOr<ShmRegion> Create(int32_t ranks,
                                                        int64_t slot_bytes = kShmSlotBytes);
  // Maps the region behind `fd`, which stays the caller's. INVALID_ARGUMENT when it is no region.
  [[nodiscard]] static absl::StatusOr<ShmRegion> Attach(int fd);

  ShmRegion(ShmRegion&& other) noexcept;
  ShmRegion& operator=(ShmRegion&& other) noexcept;
  ~ShmRegion();

  [[nodiscard]] int fd() const { return fd_; }
  [[nodiscard]] int32_t ranks() const;
  [[nodiscard]] int64_t bytes() const { return static_cast<int64_t>(bytes_); }

  // The group's abort word: every pending and later call on every rank returns ABORTED. Any thread
  // of any process.
  void Abort();
  [[nodiscard]] bool aborted() const;

  struct Header;
  [[nodiscard]] Header* header() const { return header_; }

 private:
  ShmRegion(int fd, Header* header, size_t bytes) : fd_(fd), header_(header), bytes_(bytes) {}

  int fd_ = -1;  // owned when >= 0
  Header* header_ = nullptr;
  size_t bytes_ = 0;
};

struct ShmOptions {
  // How long a round may wait for a peer. After that the call fails with DEADLINE_EXCEEDED, and
  // the group is aborted.
  Duration timeout = std::chrono::seconds(10);
  // Threads on this machine that may wait at once (ranks x compute threads): waits spin only while
  // each of them can have a core. 0 = one a rank.
  int32_t waiting_threads = 0;
};

// The region must outlive the communicator. One communicator per rank and region, ever.
[[nodiscard]] absl::StatusOr<std::unique_ptr<Communicator>> MakeShmCommunicator(
    ShmRegion* region, int32_t rank, const ShmOptions& options);

}  // namespace nibble::collectives
