// How the ranks of a group, each on a GPU of its own that can write to the others' memory, exchange
// parts of sums inside the kernels that make or take them.
//
// A sum is one trip: a rank stores its part into every rank's memory, its own too, and takes all
// parts from its own memory as they come in, in rank order, so all ranks hold the same bits. Words
// say by themselves that they have come: those of products carry the sum's number beside the data,
// those of norms are not all bits set. Two sets of words, used in turns, are enough: a rank cannot
// be two sums ahead, as each of its sums has taken the others' parts of the one before.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nibble::cuda {

inline constexpr int32_t kPeersMax = 8;
inline constexpr int32_t kExchangeBlocksMax = 1024;       // of a launch
inline constexpr int32_t kExchangeHiddenMax = 16 * 1024;  // of norms

// Why a loop that waits for a peer was left. In mapped host memory, written once.
enum class ExchangeFault : uint32_t { kNone = 0, kAborted = 1, kTimeout = 2 };

// Memory through which ranks exchange. Borrowed; laid out alike on every rank.
struct PeerExchange {
  int32_t rank = 0;
  int32_t ranks = 0;  // 0: nothing is exchanged
  // Of every rank, as mapped here, [2 sets][sender][words]: of sums in decode products
  // (w4_decode.h, zero at first), and of those in norms (w4_order.h, all bits set at first).
  uint4* products[kPeersMax] = {};
  uint4* norms[kPeersMax] = {};
  int64_t product_words = 0;
  int64_t norm_words = 0;
  // Of this rank, zero at first: sums that each block of products, then of norms, has taken.
  uint32_t* epochs = nullptr;                     // [2][kExchangeBlocksMax]
  const volatile uint32_t* abort_word = nullptr;  // host memory: not 0 ends every wait
  volatile uint32_t* fault = nullptr;             // host memory: an ExchangeFault
  uint32_t* failed = nullptr;                     // device memory: not 0 once a wait was left
  uint64_t limit_ns = 0;                          // of one wait
};

// Words of one sender and set: two rows of a tile's sixteen, four bytes of data and four of the
// sum's number each; eight 16-bit numbers, in whole slabs of columns.
[[nodiscard]] constexpr int64_t ProductExchangeWords(int32_t tokens, int32_t rows) {
  return int64_t{tokens} * ((rows + 15) / 16 * 8);
}
[[nodiscard]] constexpr int64_t NormExchangeWords(int32_t tokens, int32_t hidden) {
  return int64_t{tokens} * ((hidden + 127) / 128 * 16);
}

}  // namespace nibble::cuda
