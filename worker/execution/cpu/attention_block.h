// The attention half of a decoder layer: one QKV product, rotation and KV write in one pass, paged
// attention, the output product.
#pragma once

#include <atomic>
#include <cstdint>

#include "worker/execution/cpu/rank_context.h"

namespace nibble::execution {

class AttentionBlock {
 public:
  explicit AttentionBlock(RankContext* context) : context_(context) {}

  // Called by every thread with the normed input of the layer. Leaves this rank's partial sum in
  // Buffers::projected, complete after the next barrier.
  void Run(int32_t thread, int32_t layer, const MatrixInput& input);

 private:
  void RotateAndStore(int32_t thread, int32_t layer);
  void Attend(int32_t layer);

  RankContext* const context_;
  std::atomic<int32_t> next_piece_{0};
};

}  // namespace nibble::execution
