// The GPUs of a tensor-parallel group: NCCL for large messages, memory that peers write into for
// small ones.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "kernels/cuda/peer_exchange.h"
#include "worker/collectives/communicator.h"
#include "worker/execution/cuda/device_memory.h"
#include "worker/execution/cuda/nccl_library.h"

namespace nibble::execution {

struct GpuGroupOptions {
  collectives::Communicator* host = nullptr;  // of the same ranks; borrowed while joining
  int32_t exchange_columns = 0;               // of sums taken inside kernels; 0: none are
  bool one_machine = true;  // where not, NCCL carries small sums, too; every rank says the same
  Duration patience = {};   // for peers: while joining, and in a device's wait
};

// Of one rank, on the device that was current when it was made. NCCL's communicator does not block:
// every call of NCCL is waited for here, until it is enqueued. One thread, but for Abort().
class GpuGroup {
 public:
  // Every rank calls this at the same time. FAILED_PRECONDITION without NCCL, DEADLINE_EXCEEDED
  // when a peer does not come, else what NCCL said. NVLink multicast (NVLS) is off unless the
  // environment sets NCCL_NVLS_ENABLE.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<GpuGroup>> Join(
      const GpuGroupOptions& options);
  // Of one rank without its peers, to time its share on one GPU: what it sends a peer comes back to
  // it as that peer's part. Nothing that is computed is the model's. Sums by NCCL are left out,
  // data stays as it is; a gather copies this rank's own part.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<GpuGroup>> Echo(int32_t rank, int32_t ranks,
                                                                      int32_t exchange_columns,
                                                                      Duration patience);
  ~GpuGroup();
  GpuGroup(const GpuGroup&) = delete;
  GpuGroup& operator=(const GpuGroup&) = delete;

  [[nodiscard]] int32_t rank() const { return rank_; }
  [[nodiscard]] int32_t ranks() const { return ranks_; }

  // In place; may be captured in a graph.
  [[nodiscard]] absl::Status AllReduce(void* data, int64_t count, NcclType type,
                                       cudaStream_t stream);
  // `all`: [ranks][count] floats.
  [[nodiscard]] absl::Status AllGather(const float* mine, float* all, int64_t count,
                                       cudaStream_t stream);

  // nullptr where the GPUs cannot write to each other's memory.
  [[nodiscard]] const cuda::PeerExchange* exchange() const {
    return exchange_.has_value() ? &*exchange_ : nullptr;
  }
  // What Join allocates for it on each rank.
  [[nodiscard]] static int64_t ExchangeBytes(int32_t ranks, int32_t exchange_columns);
  [[nodiscard]] int64_t bytes() const { return arena_.bytes(); }

  // ABORTED or INTERNAL once a peer is lost: NCCL's asynchronous errors and waits left on devices.
  [[nodiscard]] absl::Status Poll();
  // Any thread: every wait on this device ends.
  void Abort();

 private:
  GpuGroup(int32_t rank, int32_t ranks, Duration patience)
      : rank_(rank), ranks_(ranks), patience_(patience) {}

  [[nodiscard]] absl::Status StartNccl(collectives::Communicator* host);
  // This rank's own words and numbers.
  [[nodiscard]] absl::StatusOr<cuda::PeerExchange> MakeExchange(int32_t columns);
  [[nodiscard]] absl::Status OpenPeers(const GpuGroupOptions& options);
  [[nodiscard]] absl::StatusOr<bool> AllCanReachEachOther(collectives::Communicator* host) const;
  // Until NCCL has done what it was called for.
  [[nodiscard]] absl::Status Finish(int result, const char* what);

  const int32_t rank_;
  const int32_t ranks_;
  const Duration patience_;
  std::unique_ptr<NcclLibrary> nccl_;
  NcclCommunicator* communicator_ = nullptr;  // nullptr: an echo
  DeviceArena arena_;
  PinnedMemory words_;  // the abort word, then the fault
  std::optional<cuda::PeerExchange> exchange_;
};

}  // namespace nibble::execution
