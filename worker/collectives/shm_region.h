// The layout of the memory behind ShmRegion. All zero bytes beyond the first fields is its start.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "worker/collectives/event_word.h"
#include "worker/collectives/shm_communicator.h"

namespace nibble::collectives {

// Header, then ranks x 2 slots of slot_bytes.
struct ShmRegion::Header {
  static constexpr uint64_t kMagic = 0x6c626e2d6d687331;  // changes with the layout

  uint64_t magic = 0;
  int32_t ranks = 0;
  int64_t slot_bytes = 0;

  alignas(64) std::atomic<uint32_t> aborted{0};
  // Arrivals ever; the one that makes it round * ranks completes the round.
  alignas(64) std::atomic<uint64_t> arrivals{0};
  alignas(64) std::atomic<uint64_t> completed{0};  // rounds; guarded by nobody: rises only
  EventWord event;                                 // signalled on completion and on abort

  struct alignas(64) PerRank {
    std::atomic<uint64_t> round{0};     // the last round this rank arrived at
    std::array<uint64_t, 2> kind{};     // of its last two rounds: what the rank believes it runs
    std::atomic<uint32_t> attached{0};  // 1 once a communicator was made
  };
  std::array<PerRank, kShmRanksMax> per_rank;

  [[nodiscard]] std::byte* slot(int32_t rank, uint64_t round) {
    return reinterpret_cast<std::byte*>(this) + sizeof(Header) +
           (static_cast<int64_t>(rank) * 2 + static_cast<int64_t>(round % 2)) * slot_bytes;
  }
  [[nodiscard]] static size_t RegionBytes(int32_t ranks, int64_t slot_bytes) {
    return sizeof(Header) + static_cast<size_t>(ranks) * 2 * static_cast<size_t>(slot_bytes);
  }
};
static_assert(sizeof(ShmRegion::Header) % 64 == 0);

}  // namespace nibble::collectives
