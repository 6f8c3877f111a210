#pragma once

#include <cstdint>

namespace nibble::cuda {

// How many pieces of `size` hold `count`. Host code.
constexpr int32_t CeilDivide(int32_t count, int32_t size) { return (count + size - 1) / size; }

}  // namespace nibble::cuda
