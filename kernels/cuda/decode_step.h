// The products of a decode step of 1 to 8 tokens, one after the other, as one kernel.
//
// One block a multiprocessor stays for all of them. Its weights are streams through rings in shared
// memory, fed by warps of their own that run ahead across every boundary between products, so
// memory works while blocks meet. What would be kernels of their own otherwise are phases; between
// two of them all blocks meet in memory.
//
// Not part of the decoder yet: attention has no phase, and on the one device that ran an earlier
// form it took longer than the chain of kernels (NOTES.md).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/w4_decode.h"

namespace nibble::cuda {

inline constexpr int32_t kDecodeStepTokens = 8;

// A product as W4Decode takes it. Its `tokens` and `dependent_launch` do not matter: the step knows
// its tokens.
struct alignas(16) StepPhase {
  W4DecodeParams product;
};

struct DecodeStepParams {
  const StepPhase* phases = nullptr;  // [phase_count], on the device
  int32_t phase_count = 0;
  int32_t tokens = 0;  // 1 … kDecodeStepTokens
  // Where blocks meet: zero at first, then left to the kernel, launch after launch with the same
  // number of blocks.
  uint64_t* arrivals = nullptr;
  int32_t window = 0;  // pieces that a producer has on their way from memory; 0: what measured best
};

// Whether the kernel takes such a product: groups of 128 or dense, rows in eights.
[[nodiscard]] bool DecodeStepTakes(const StepPhase& phase, int32_t multiprocessors);

// Every multiprocessor takes a block, all at once. Graph-capturable.
// REQUIRES: DecodeStepTakes every phase.
[[nodiscard]] cudaError_t DecodeStep(const DecodeStepParams& params, int32_t multiprocessors,
                                     cudaStream_t stream);

}  // namespace nibble::cuda
