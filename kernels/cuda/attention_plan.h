// How a step's attention is cut into work for the GPU. Host code, called once a step.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/cuda/attention.h"

namespace nibble::cuda {

struct AttentionPlanShape {
  int32_t kv_heads = 0;
  int32_t blocks = kAttentionBlocks;  // that work side by side
  int32_t window = 0;                 // the widest of the layers; 0 where one sees all positions
};

// Blocks for the kernel that streams. A step of few sequences is a chain of kernels of one block a
// multiprocessor each; above, two hide each other's waits.
[[nodiscard]] constexpr int32_t AttentionBlocks(int32_t tiles, int32_t multiprocessors) {
  return tiles <= 16 ? multiprocessors : 2 * multiprocessors;
}

// Units beyond one a tile that a plan may have.
[[nodiscard]] int32_t AttentionUnitsExtra(int32_t kv_heads);

// Parts that a plan's split tiles have together, at most: places in the scratch memory.
[[nodiscard]] int32_t AttentionPlaces(int32_t kv_heads);

// Cuts the KV blocks of tiles into parts where that shortens the step, and orders the units so that
// blocks that take them in turn end together. Writes at most tiles + AttentionUnitsExtra units.
void PlanAttention(std::span<const AttentionTile> tiles, const AttentionPlanShape& shape,
                   std::vector<AttentionUnit>* units);

}  // namespace nibble::cuda
