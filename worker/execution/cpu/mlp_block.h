// The MLP half of a decoder layer: gate and up in one product, SiLU and product, down.
#pragma once

#include <cstdint>

#include "worker/execution/cpu/rank_context.h"

namespace nibble::execution {

// Called by every thread with the normed input. Leaves this rank's partial sum in
// Buffers::projected, complete after the next barrier.
void RunMlpBlock(RankContext* context, int32_t thread, int32_t layer, const MatrixInput& input);

}  // namespace nibble::execution
