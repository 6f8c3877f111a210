// Sums over the ranks of a group, each on a GPU of its own that can write to the others' memory,
// and what surrounds sums that NCCL takes.
//
// A small sum is one trip: every block pushes its part of the partial result into every peer's
// memory, four bytes of data beside four of the sum's number, and takes the peers' parts from its
// own memory as they come in. The number is the flag, so data and flag arrive together and nothing
// is reset. Two sets of slots, used in turns, are enough: a peer cannot be two sums ahead. Parts
// are added in rank order, so all ranks hold the same bits.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/element.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/w4_decode.h"

namespace nibble::cuda {

inline constexpr int32_t kPeersMax = 8;
inline constexpr int32_t kExchangeColumns = 512;  // of one block

// Why a loop that waits for a peer was left. In mapped host memory, written once.
enum class ExchangeFault : uint32_t { kNone = 0, kAborted = 1, kTimeout = 2 };

// Memory through which ranks exchange. Borrowed; laid out alike on every rank.
struct PeerExchange {
  int32_t rank = 0;
  int32_t ranks = 0;
  int32_t blocks_max = 0;
  uint4* slots[kPeersMax] = {};                   // of every rank, as mapped here; zero at first
  uint32_t* epochs = nullptr;                     // [blocks_max], of this rank; zero at first
  const volatile uint32_t* abort_word = nullptr;  // host memory: not 0 ends every wait
  volatile uint32_t* fault = nullptr;             // host memory: an ExchangeFault
  uint32_t* failed = nullptr;                     // device memory: not 0 once a wait was left
  uint64_t limit_ns = 0;                          // of one wait
};

[[nodiscard]] constexpr int32_t ExchangeParts(int32_t hidden) {
  return (hidden + kExchangeColumns - 1) / kExchangeColumns;
}
// Of what one rank sends in one of the two sets of slots, in words of 16 bytes.
[[nodiscard]] constexpr int64_t ExchangeSenderWords(int32_t blocks_max) {
  return int64_t{blocks_max} * kExchangeColumns / 2;
}
// Of one rank's slots.
[[nodiscard]] constexpr int64_t ExchangeSlotBytes(int32_t ranks, int32_t blocks_max) {
  return 2 * ranks * ExchangeSenderWords(blocks_max) * int64_t{sizeof(uint4)};
}

// residual += sum over ranks of partial; then what W4Decode's kAddResidual leaves for the next
// product, with ExchangeParts(hidden) sums of squares a token.
struct AllReduceAddParams {
  PeerExchange exchange;
  const float* partial = nullptr;  // [tokens, hidden]
  float* residual = nullptr;       // [tokens, hidden]
  int32_t tokens = 0;              // tokens * ExchangeParts(hidden) <= blocks_max
  int32_t hidden = 0;              // a multiple of 4
  NextInput next;                  // x == nullptr: nothing is left
};
[[nodiscard]] cudaError_t AllReduceAdd(const AllReduceAddParams& params,
                                       const LaunchOptions& options);

// residual += partial where another has taken the sum; one of the two is given.
struct AddPartialParams {
  float* residual = nullptr;
  const float* partial_float = nullptr;
  const Real16* partial_half = nullptr;
  int64_t count = 0;  // a multiple of 4
};
[[nodiscard]] cudaError_t AddPartial(const AddPartialParams& params, const LaunchOptions& options);

// The ranks' logits, gathered one rank behind the other, laid side by side.
struct JoinLogitsParams {
  const float* gathered = nullptr;  // [ranks][rank_stride]: rank r's [rows, begin[r+1] - begin[r]]
  int64_t rank_stride = 0;
  int32_t ranks = 0;                  // at most kPeersMax
  int32_t begin[kPeersMax + 1] = {};  // of each rank's share of the vocabulary
  int32_t rows = 0;
  float* logits = nullptr;  // [rows, vocab]
};
[[nodiscard]] cudaError_t JoinLogits(const JoinLogitsParams& params, const LaunchOptions& options);

}  // namespace nibble::cuda
