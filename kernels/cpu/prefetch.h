// Prefetching of weights. In an unnamed namespace: each translation unit has its own copy.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/unroll.h"

namespace nibble::cpu {
namespace {

// Weights come from memory, faster with more requests in flight than the hardware prefetcher makes
// (11.8 -> 16 GB/s on one core). So for every 64 bytes read, those `ahead` of them are asked for,
// into L2. Past the end of a matrix this does nothing.
inline constexpr int64_t kPrefetchAhead = 4096;

NIBBLE_INLINE inline void Prefetch(const void* p, int64_t ahead = kPrefetchAhead) {
  _mm_prefetch(static_cast<const char*>(p) + ahead, _MM_HINT_T1);
}

// `streams` row blocks of `bytes` each, which follow each other, are read side by side. A page
// ahead in each, unless that leads into the next of them: then the same place in the blocks after.
NIBBLE_INLINE inline int64_t PrefetchAhead(int64_t bytes, int streams) {
  return bytes >= 2 * kPrefetchAhead || streams == 1 ? kPrefetchAhead : bytes * streams;
}

}  // namespace
}  // namespace nibble::cpu
