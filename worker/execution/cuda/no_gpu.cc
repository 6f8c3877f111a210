// What gpu_rank.h says in a build without CUDA.
#include "worker/execution/cuda/gpu_rank.h"

namespace nibble::execution {

absl::Status CheckGpuBuild() {
  return absl::UnimplementedError(
      "this build has no GPU support (it was configured without NIBBLE_CUDA)");
}

absl::StatusOr<GpuInfo> OpenGpu(int32_t /*ordinal*/) { return CheckGpuBuild(); }

absl::StatusOr<double> GpuReadBandwidth(const GpuInfo& /*gpu*/) { return CheckGpuBuild(); }

absl::StatusOr<weights::MemoryPlan> PlanGpuMemory(const GpuModelSource& /*source*/,
                                                  int32_t /*rank_count*/,
                                                  const GpuPlanOptions& /*options*/) {
  return CheckGpuBuild();
}

absl::StatusOr<GpuExecutor> CreateGpuExecutor(const GpuInfo& /*gpu*/,
                                              const GpuModelSource& /*source*/,
                                              const weights::MemoryPlan& /*plan*/,
                                              const GpuExecutorOptions& /*options*/) {
  return CheckGpuBuild();
}

}  // namespace nibble::execution
