#include "worker/execution/cuda/decode_graphs.h"

#include <algorithm>

#include "base/check.h"

namespace nibble::execution {

std::vector<int32_t> DecodeGraphBatches(int32_t largest) {
  std::vector<int32_t> batches;
  for (int32_t batch = 1; batch <= std::min(16, largest); ++batch) batches.push_back(batch);
  for (const int32_t batch : {24, 32, 48, 64, 96, 128, 192, 256}) {
    if (batches.back() < largest) batches.push_back(std::min(batch, largest));
  }
  return batches;
}

absl::StatusOr<std::unique_ptr<DecodeGraphs>> DecodeGraphs::Capture(
    CudaDecoder* decoder, cudaStream_t stream, int32_t largest,
    const std::function<StepView(int32_t tokens)>& view_of) {
  std::unique_ptr<DecodeGraphs> graphs(new DecodeGraphs(stream));
  for (const int32_t batch : DecodeGraphBatches(largest)) {
    RETURN_IF_ERROR(graphs->CaptureOne(decoder, view_of(batch)));
  }
  return graphs;
}

absl::Status DecodeGraphs::CaptureOne(CudaDecoder* decoder, const StepView& view) {
  // Relaxed: a kernel's code may be loaded at its first launch, here.
  RETURN_IF_ERROR(CudaStatus(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeRelaxed),
                             "beginning a graph"));
  absl::Status status = decoder->Forward(view);
  if (status.ok()) status = decoder->SampleRows(view, 0, view.rows);
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream_, &graph);
  RETURN_IF_ERROR(status);
  RETURN_IF_ERROR(CudaStatus(ended, "ending a graph"));
  cudaGraphExec_t executable = nullptr;
  const cudaError_t made = cudaGraphInstantiate(&executable, graph, 0);
  static_cast<void>(cudaGraphDestroy(graph));
  RETURN_IF_ERROR(CudaStatus(made, "making a graph"));
  graphs_.push_back({.batch = view.tokens, .executable = executable});
  return CudaStatus(cudaGraphUpload(executable, stream_), "uploading a graph");
}

DecodeGraphs::~DecodeGraphs() {
  for (const Graph& graph : graphs_) static_cast<void>(cudaGraphExecDestroy(graph.executable));
}

int32_t DecodeGraphs::BatchFor(int32_t tokens) const {
  for (const Graph& graph : graphs_) {
    if (graph.batch >= tokens) return graph.batch;
  }
  return 0;
}

absl::Status DecodeGraphs::Launch(int32_t batch) {
  const auto found = std::find_if(graphs_.begin(), graphs_.end(),
                                  [&](const Graph& graph) { return graph.batch == batch; });
  CHECK(found != graphs_.end());
  return CudaStatus(cudaGraphLaunch(found->executable, stream_), "launching a graph");
}

}  // namespace nibble::execution
