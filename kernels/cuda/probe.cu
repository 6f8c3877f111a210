#include "kernels/cuda/probe.h"

namespace nibble::cuda {
namespace {

__global__ void ProbeKernel() {}

}  // namespace

cudaError_t ProbeKernels() {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, ProbeKernel);
}

}  // namespace nibble::cuda
