// Where the parts of a step's inputs lie on the device.
#pragma once

#include <cstddef>

#include "worker/execution/cuda/cuda_decoder.h"
#include "worker/execution/cuda/step_inputs.h"

namespace nibble::execution {

// What follows from the inputs alone; the caller adds what lies elsewhere.
[[nodiscard]] StepView ViewOfInputs(const std::byte* inputs, const StepOffsets& offsets,
                                    const StepShape& shape);

}  // namespace nibble::execution
