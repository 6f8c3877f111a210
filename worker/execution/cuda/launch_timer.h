// Times the operations of a step one by one, by events on the stream between them.
//
// While it is in use kernels run alone: no graphs, and none starts before the one before it has
// ended. A time holds the launch, the kernel's beginning and its end.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/execution/cuda/gpu_rank.h"

namespace nibble::execution {

// One thread; the stream is borrowed.
class LaunchTimer {
 public:
  explicit LaunchTimer(cudaStream_t stream) : stream_(stream) {}
  ~LaunchTimer();
  LaunchTimer(const LaunchTimer&) = delete;
  LaunchTimer& operator=(const LaunchTimer&) = delete;

  // Before the first operation of a step. The stream waits a little, so that the host is ahead and
  // its own time is not measured.
  [[nodiscard]] absl::Status BeginStep();
  // Behind an operation: `name` is a literal, `bytes` and `flops` the least that it must read and
  // compute.
  [[nodiscard]] absl::Status Mark(std::string_view name, int64_t bytes, int64_t flops);
  // Of all steps since it was made, in the order of the first step. Waits for the stream.
  [[nodiscard]] absl::StatusOr<std::vector<OperationTime>> Times();

 private:
  struct Point {
    std::string_view name;
    int64_t bytes, flops;
    cudaEvent_t event;
  };

  const cudaStream_t stream_;
  std::vector<std::vector<Point>> steps_;  // the first mark of a step is its beginning
};

}  // namespace nibble::execution
