// How long what is captured in a CUDA graph takes.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <vector>

#include "tests/gpu/device_array.h"

namespace nibble::cuda {

struct GraphTimes {
  double median_us = 0;
  double least_us = 0;
};

// Captures what `work` launches on the stream, runs it `warm_ups` times, then `runs` times with
// the clock of the device.
template <typename Work>
GraphTimes TimeGraph(cudaStream_t stream, int warm_ups, int runs, const Work& work) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  work();
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin = nullptr, end = nullptr;
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = 0; run < warm_ups + runs; ++run) {
    CUDA_OK(cudaEventRecord(begin, stream));
    CUDA_OK(cudaGraphLaunch(executable, stream));
    CUDA_OK(cudaEventRecord(end, stream));
    CUDA_OK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_OK(cudaEventElapsedTime(&ms, begin, end));
    if (run >= warm_ups) times.push_back(ms * 1000);
  }
  CUDA_OK(cudaEventDestroy(begin));
  CUDA_OK(cudaEventDestroy(end));
  CUDA_OK(cudaGraphExecDestroy(executable));
  CUDA_OK(cudaGraphDestroy(graph));
  std::sort(times.begin(), times.end());
  return {.median_us = times[times.size() / 2], .least_us = times.front()};
}

}  // namespace nibble::cuda
