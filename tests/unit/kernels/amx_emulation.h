// The AMX product with its tile registers emulated, so that packing, tile shapes and the order of
// sums can be tested on a machine without AMX. Needs AVX-512 for the part around the tiles.
#pragma once

#include "kernels/cpu/kernels.h"

namespace nibble::cpu {

// Aborts with a message where the instructions would fault or read what is not configured.
void GemmW4Int8AmxEmulated(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
                           BlockRange blocks);

}  // namespace nibble::cpu
