// Storing to peers, and waiting for what they store (peer_exchange.h).
#pragma once

#include <cstdint>

#include "kernels/cuda/peer_exchange.h"

namespace nibble::cuda {

constexpr int32_t kPollsBetweenChecks = 1 << 10;

// Seen by the peer in no smaller pieces than 4 bytes, and 8 that belong together in one.
__device__ __forceinline__ void PushWord(uint4* to, const uint4& word) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x),
               "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}
__device__ __forceinline__ uint4 PeekWord(const uint4* from) {
  uint4 word;
  asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from)
               : "memory");
  return word;
}

// How far behind the first word those of sum `number` begin.
__device__ __forceinline__ int64_t ExchangeSet(const PeerExchange& exchange, int64_t words,
                                               uint32_t number) {
  return (number & 1) != 0 ? exchange.ranks * words : 0;
}
// Word `at` of this rank's part of sum `number` to every rank, the own one last. Few instructions:
// they run once a launch, so each must be fetched.
__device__ __forceinline__ void PushToAll(const PeerExchange& exchange, uint4* const* slots,
                                          int64_t words, uint32_t number, int64_t at,
                                          const uint4& word) {
  at += ExchangeSet(exchange, words, number) + exchange.rank * words;
  int32_t owner = exchange.rank;
#pragma unroll 1
  for (int32_t i = 0; i < exchange.ranks; ++i) {
    owner = owner + 1 < exchange.ranks ? owner + 1 : 0;
    PushWord(slots[owner] + at, word);
  }
}

__device__ __forceinline__ uint64_t GlobalTimer() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Whether a wait must be left; writes down why.
__device__ inline bool MustLeave(const PeerExchange& exchange, uint64_t* begin) {
  if (*static_cast<volatile uint32_t*>(exchange.failed) != 0) return true;
  const uint64_t now = GlobalTimer();
  if (*begin == 0) *begin = now;
  ExchangeFault fault = ExchangeFault::kNone;
  if (*exchange.abort_word != 0) fault = ExchangeFault::kAborted;
  if (now - *begin > exchange.limit_ns) fault = ExchangeFault::kTimeout;
  if (fault == ExchangeFault::kNone) return false;
  *exchange.failed = 1;
  *exchange.fault = static_cast<uint32_t>(fault);
  return true;
}

// Calls add(word) with every rank's word from `first` on, `stride` words apart, in rank order, once
// come(word) says that it is there: four of them at a time. Once the wait was left words may be
// anything.
template <typename Come, typename Add>
__device__ __forceinline__ void TakeParts(const PeerExchange& exchange, const uint4* first,
                                          int64_t stride, const Come& come, const Add& add) {
  constexpr int32_t kAtOnce = 4;
  const int32_t last = exchange.ranks - 1;
#pragma unroll 1
  for (int32_t begin = 0; begin <= last; begin += kAtOnce) {
    uint4 words[kAtOnce];
    uint64_t since = 0;
#pragma unroll 1
    for (int32_t polls = 1;; ++polls) {
      bool all = true;
#pragma unroll
      for (int32_t i = 0; i < kAtOnce; ++i)
        words[i] = PeekWord(first + min(begin + i, last) * stride);
#pragma unroll
      for (int32_t i = 0; i < kAtOnce; ++i) all = all && come(words[i]);
      if (all) break;
      if (__builtin_expect(polls % kPollsBetweenChecks == 0, 0) && MustLeave(exchange, &since))
        break;
    }
#pragma unroll
    for (int32_t i = 0; i < kAtOnce; ++i) {
      if (begin + i <= last) add(words[i], begin + i);
    }
  }
}

}  // namespace nibble::cuda
