// Collectives among the ranks of one group: self, shm, gloo (and nccl on GPUs).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"

namespace nibble::collectives {

// All ranks call the same functions in the same order with the same sizes.
// One thread calls; Abort() may be called from any thread. After an error or
// an abort every further call fails: the group is finished.
class Communicator {
 public:
  virtual ~Communicator() = default;

  [[nodiscard]] virtual int32_t rank() const = 0;
  [[nodiscard]] virtual int32_t size() const = 0;

  // data := sum over ranks, taken in rank order, so that all ranks hold the
  // same bits. fp32 is the wire type.
  [[nodiscard]] virtual absl::Status AllReduceSum(std::span<float> data) = 0;

  // all := the ranks' `mine`, one behind the other; all.size() == size() * mine.size().
  [[nodiscard]] virtual absl::Status AllGather(std::span<const std::byte> mine,
                                               std::span<std::byte> all) = 0;

  [[nodiscard]] virtual absl::Status Broadcast(std::span<std::byte> data, int32_t root) = 0;

  // residual += sum over ranks of partial; normed := RMSNorm(residual) · weight.
  // An implementation may fuse the three; the default does one after the other.
  struct AddNorm {
    std::span<float> partial;            // [tokens, hidden]; clobbered
    std::span<float> residual;           // [tokens, hidden]
    std::span<const float> norm_weight;  // [hidden]
    std::span<float> normed;             // [tokens, hidden]
    float epsilon = 0;
  };
  [[nodiscard]] virtual absl::Status AllReduceAddNorm(const AddNorm& args);

  // Makes every pending and later call on every rank return ABORTED.
  virtual void Abort() = 0;
};

}  // namespace nibble::collectives
