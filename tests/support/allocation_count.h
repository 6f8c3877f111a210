// How often the calling thread has allocated with operator new. Linking this replaces the global
// operators, so that tests can show that a warm path does not allocate.
#pragma once

#include <cstddef>

namespace nibble::testing {

[[nodiscard]] size_t AllocationCount();

}  // namespace nibble::testing
