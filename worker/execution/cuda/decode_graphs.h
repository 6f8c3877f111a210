// CUDA graphs of decode steps, one per batch size: the whole step from the embedding to the sampled
// tokens. Lengths, block tables and tokens lie on the device, so a graph fits every step.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/execution/cuda/cuda_decoder.h"

namespace nibble::execution {

// The batches that graphs are made for: every one up to 16, then steps of a quarter to a third.
[[nodiscard]] std::vector<int32_t> DecodeGraphBatches(int32_t largest);

class DecodeGraphs {
 public:
  // Batches of up to `largest` tokens. `view_of` says where a batch's inputs will lie.
  [[nodiscard]] static absl::StatusOr<std::unique_ptr<DecodeGraphs>> Capture(
      CudaDecoder* decoder, cudaStream_t stream, int32_t largest,
      const std::function<StepView(int32_t tokens)>& view_of);
  ~DecodeGraphs();
  DecodeGraphs(const DecodeGraphs&) = delete;
  DecodeGraphs& operator=(const DecodeGraphs&) = delete;

  // The smallest batch that holds `tokens`; 0 when none does.
  [[nodiscard]] int32_t BatchFor(int32_t tokens) const;
  // REQUIRES: a size that BatchFor gave.
  [[nodiscard]] absl::Status Launch(int32_t batch);

 private:
  explicit DecodeGraphs(cudaStream_t stream) : stream_(stream) {}
  [[nodiscard]] absl::Status CaptureOne(CudaDecoder* decoder, const StepView& view);

  struct Graph {
    int32_t batch = 0;
    cudaGraphExec_t executable = nullptr;
  };
  const cudaStream_t stream_;
  std::vector<Graph> graphs_;  // by rising batch
};

}  // namespace nibble::execution
