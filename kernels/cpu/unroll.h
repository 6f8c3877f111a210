// Loops that are unrolled before the optimizer looks at arrays of registers.
//
// GCC 12 keeps an array of vectors in memory when the loops over it are unrolled late; with
// constant indices from the start it becomes registers. In an unnamed namespace, so that each
// translation unit has its own copy in its own instruction set.
#pragma once

namespace nibble::cpu {
namespace {

#define NIBBLE_INLINE __attribute__((always_inline))

template <int kValue>
struct Index {
  static constexpr int kConstant = kValue;
  NIBBLE_INLINE constexpr operator int() const { return kValue; }
};

// body(0), …, body(kCount - 1), each with a constant.
template <int kCount, int kFirst = 0, class Body>
NIBBLE_INLINE inline void Unroll(const Body& body) {
  if constexpr (kFirst < kCount) {
    body(Index<kFirst>{});
    Unroll<kCount, kFirst + 1>(body);
  }
}

}  // namespace
}  // namespace nibble::cpu
