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

// Where `sender` leaves its part of sum `number` with `owner`.
__device__ __forceinline__ uint4* ExchangePlace(const PeerExchange& exchange, uint4* const* slots,
                                                int64_t words, uint32_t number, int32_t owner,
                                                int32_t sender) {
  return slots[owner] + ((number & 1) * exchange.ranks + sender) * words;
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

// Every rank's word from `first` on, `stride` words apart; `come(word)` says whether one is there.
// Those that are missing are asked for together. Once the wait was left they may be anything.
template <typename Come>
__device__ __forceinline__ void TakeParts(const PeerExchange& exchange, const uint4* first,
                                          int64_t stride, uint4 (&words)[kPeersMax],
                                          const Come& come) {
#pragma unroll
  for (int32_t sender = 0; sender < kPeersMax; ++sender) {
    if (sender < exchange.ranks) words[sender] = PeekWord(first + sender * stride);
  }
  uint64_t begin = 0;
  for (int32_t polls = 1;; ++polls) {
    bool all = true;
#pragma unroll
    for (int32_t sender = 0; sender < kPeersMax; ++sender) {
      if (sender >= exchange.ranks || come(words[sender])) continue;
      words[sender] = PeekWord(first + sender * stride);
      all = false;
    }
    if (all || (polls % kPollsBetweenChecks == 0 && MustLeave(exchange, &begin))) return;
  }
}

}  // namespace nibble::cuda
