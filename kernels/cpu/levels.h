// The table of each level, for dispatch.cc alone.
#pragma once

#include "kernels/cpu/kernels.h"

namespace nibble::cpu {

extern const Kernels kReferenceKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
[[nodiscard]] Kernels AmxKernels();  // REQUIRES: AMX and permission to use it

// The same code at every level: a sum in rising k has nothing to vectorize within a group.
void GroupSums(const FloatRows& x, int32_t group, float* sums);

}  // namespace nibble::cpu
