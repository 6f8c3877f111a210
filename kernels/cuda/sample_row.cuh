// A row of logits among the blocks of a cluster: its parts, passes over its tokens with their
// adjusted logits, and what all its blocks find together.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cuda/sample_math.cuh"
#include "kernels/cuda/sample_whole.h"
#include "kernels/cuda/token_counts.h"

namespace nibble::cuda {

inline constexpr int32_t kRowThreads = 1024;
inline constexpr int32_t kRowWarps = kRowThreads / 32;
inline constexpr int32_t kLoads = 8;  // of a thread, in flight
inline constexpr int32_t kBuckets = kRowThreads;
inline constexpr int32_t kListMax = kRowThreads;

// Tokens with a place in some order: (key, token id) as one number, and what each weighs.
struct TokenList {
  uint64_t places[kListMax];
  uint32_t weights[kListMax];
  int32_t count;  // also of those that found no room
};

// Of a block. What the others of the cluster read is written before one Meet and not again before
// the next one. `list` alone is filled by all parts: between the Meet that follows its emptying
// (FindBucket's) and Gather's.
struct Shared {
  WholeRow asked;
  uint2 sums[kBuckets];  // of weights by bucket, in two words
  TokenList list;        // of all parts
  uint64_t warp_sums[kRowWarps];
  uint4 results[kRowWarps + 1];  // of reductions; the block's stands last
  uint64_t before, cut;
  uint64_t bounds[kGumbelBounds];
  int32_t bucket;
  int32_t sparse_ids[kSparseMax];
  float sparse_values[kSparseMax];
};
extern __shared__ uint4 row_memory[];
// By name, not by reference: so the compiler knows where it lies.
__device__ __forceinline__ Shared& Block() { return *reinterpret_cast<Shared*>(row_memory); }
// Behind it: a bit for each token of the part, whether it is one of sparse_ids; then, where there
// is room, its adjusted logit.
__host__ __device__ constexpr int32_t SparseWords(int32_t tokens) { return (tokens + 31) / 32; }

// What a block knows of its row.
struct Row {
  const WholeParams& p;
  int32_t part, parts;
  int32_t begin, end;  // tokens of this part
  const float* logits;
  const TokenCount* counts;  // nullptr: no penalties
  const uint32_t* mask;      // nullptr: none
  int32_t sparse_count;
  bool keeps_values;  // adjusted logits

  __device__ __forceinline__ const WholeRow& asked() const { return Block().asked; }
  // [tokens of the part]
  __device__ __forceinline__ uint32_t* sparse_bits() const {
    return reinterpret_cast<uint32_t*>(&Block() + 1);
  }
  __device__ __forceinline__ float* values() const {
    return reinterpret_cast<float*>(sparse_bits() + SparseWords(p.vocab_size / parts + 1));
  }
};

// All threads of the row's blocks have come, and see what the others have written.
__device__ __forceinline__ void Meet(const Row& row) {
#if __CUDA_ARCH__ >= 900
  if (row.parts > 1) {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// Where `mine` lies in the shared memory of another of the row's blocks.
template <typename T>
__device__ __forceinline__ T* OfPart(const Row& row, T* mine, int32_t part) {
#if __CUDA_ARCH__ >= 900
  if (row.parts > 1) {
    T* theirs;
    asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(part));
    return theirs;
  }
#endif
  return mine;
}

template <typename T>
__device__ __forceinline__ T ShuffleXor(const T& value, int32_t lanes) {
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, lanes);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

// take(&a, b) of the values of all threads of the row, on each of them.
template <typename T, typename Take>
__device__ T OverRow(const Row& row, T mine, const Take& take) {
  static_assert(sizeof(T) <= sizeof(uint4));
  T* results = reinterpret_cast<T*>(Block().results);
  const auto over_warp = [&] {
#pragma unroll 1
    for (int32_t lanes = 16; lanes > 0; lanes /= 2) take(&mine, ShuffleXor(mine, lanes));
  };
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  over_warp();
  if (lane == 0) results[warp] = mine;
  __syncthreads();
  if (warp == 0) {
    mine = results[lane];
    over_warp();
    if (lane == 0) results[kRowWarps] = mine;
  }
  Meet(row);
  T total = *OfPart(row, results + kRowWarps, 0);
#pragma unroll 1
  for (int32_t part = 1; part < row.parts; ++part) {
    take(&total, *OfPart(row, results + kRowWarps, part));
  }
  Meet(row);
  return total;
}

template <typename T>
__device__ __forceinline__ T SumOverRow(const Row& row, T mine) {
  return OverRow(row, mine, [](T* sum, T other) { *sum += other; });
}

using sampling::Penalized;

__device__ __forceinline__ int32_t Min(int32_t a, int32_t b) { return a < b ? a : b; }

// The logit of a token that is a draft, has a bias or is forbidden, but for the mask.
__device__ inline float SparseValue(const Row& row, int32_t token) {
  const WholeRow& asked = row.asked();
  float value = row.logits[token];
  if (row.counts != nullptr) {
    const TokenCount count = row.counts[token];
    int32_t times = 0;
#pragma unroll 1
    for (int32_t i = 0; i < asked.draft_count; ++i) {
      times += row.p.ids[asked.draft_begin + i] == token ? 1 : 0;
    }
    const int32_t outputs = Min((count & kOutputMax) + times, kOutputMax);
    value = Penalized(value, static_cast<TokenCount>((count & kInPrompt) | outputs), asked);
  }
#pragma unroll 1
  for (int32_t i = 0; i < asked.bias_count; ++i) {
    const TokenBias& bias = row.p.biases[asked.bias_begin + i];
    if (bias.token_id == token) value += bias.bias;
  }
#pragma unroll 1
  for (int32_t i = 0; i < asked.forbidden_count; ++i) {
    if (row.p.ids[asked.forbidden_begin + i] == token) value = -INFINITY;
  }
  return value;
}

__device__ inline int32_t SparseToken(const Row& row, int32_t index) {
  const WholeRow& asked = row.asked();
  if (index < asked.bias_count) return row.p.biases[asked.bias_begin + index].token_id;
  index -= asked.bias_count;
  if (index < asked.forbidden_count) return row.p.ids[asked.forbidden_begin + index];
  return row.p.ids[asked.draft_begin + index - asked.forbidden_count];
}

__device__ inline void FillSparse(const Row& row) {
  if (row.sparse_count == 0) return;
  Shared& shared = Block();
  for (int32_t i = threadIdx.x; i < (row.end - row.begin + 31) / 32; i += kRowThreads) {
    row.sparse_bits()[i] = 0;
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < row.sparse_count; i += kRowThreads) {
    const int32_t token = SparseToken(row, i);
    shared.sparse_ids[i] = token;
    shared.sparse_values[i] = SparseValue(row, token);
    const int32_t place = token - row.begin;
    if (place >= 0 && token < row.end) {
      atomicOr(&row.sparse_bits()[place / 32], 1u << (place % 32));
    }
  }
  __syncthreads();
}

// REQUIRES: the token is one of sparse_ids.
__device__ __noinline__ float SparseValueOf(int32_t token) {
  int32_t i = 0;
#pragma unroll 1
  while (Block().sparse_ids[i] != token) ++i;
  return Block().sparse_values[i];
}

__device__ __forceinline__ float Adjusted(const Row& row, int32_t token, float raw,
                                          TokenCount count) {
  float value = Penalized(raw, count, row.asked());
  if (row.sparse_count > 0) {
    const int32_t place = token - row.begin;
    if ((row.sparse_bits()[place / 32] >> (place % 32) & 1) != 0) {
      value = SparseValueOf(token);
    }
  }
  if (row.mask != nullptr && (row.mask[token / 32] >> (token % 32) & 1) == 0) value = -INFINITY;
  return value;
}

// Calls take(token, raw logit, adjusted logit) for the thread's tokens, by rising token, and keeps
// adjusted logits for ForEach.
template <typename Take>
__device__ __forceinline__ void ForTokensFirst(const Row& row, const Take& take) {
  for (int32_t first = row.begin + static_cast<int32_t>(threadIdx.x); first < row.end;
       first += kRowThreads * kLoads) {
    float raw[kLoads];
    TokenCount counts[kLoads];
#pragma unroll
    for (int32_t i = 0; i < kLoads; ++i) {
      const int32_t token = first + i * kRowThreads;
      raw[i] = token < row.end ? row.logits[token] : 0;
      counts[i] = row.counts != nullptr && token < row.end ? row.counts[token] : TokenCount{0};
    }
#pragma unroll
    for (int32_t i = 0; i < kLoads; ++i) {
      const int32_t token = first + i * kRowThreads;
      if (token >= row.end) continue;
      const float value = Adjusted(row, token, raw[i], counts[i]);
      if (row.keeps_values) row.values()[token - row.begin] = value;
      take(token, raw[i], value);
    }
  }
}

__device__ __noinline__ float AdjustedAgain(const Row& row, int32_t token) {
  return Adjusted(row, token, row.logits[token],
                  row.counts != nullptr ? row.counts[token] : TokenCount{0});
}

// Calls take(token, logit) for the thread's tokens, by rising token, raw logits or adjusted ones.
// Not unrolled: logits are near, and instructions that run once cost more than loops.
template <typename Take>
__device__ __forceinline__ void ForEach(const Row& row, bool raw, const Take& take) {
  const bool unchanged =
      row.keeps_values && row.counts == nullptr && row.mask == nullptr && row.sparse_count == 0;
  const bool far = raw && !unchanged;
#pragma unroll 1
  for (int32_t token = row.begin + static_cast<int32_t>(threadIdx.x); token < row.end;
       token += kRowThreads) {
    float logit;
    if (far) {
      logit = row.logits[token];
    } else {
      logit = row.keeps_values ? row.values()[token - row.begin] : AdjustedAgain(row, token);
    }
    take(token, logit);
  }
}

// The part of a row that is this block's; `asked` is copied for all its threads.
__device__ inline Row RowOf(const WholeParams& p, int32_t index, int32_t part, int32_t parts,
                            bool keeps_values) {
  constexpr uint32_t kWords = sizeof(WholeRow) / 4;
  if (threadIdx.x < kWords) {
    const auto* from = reinterpret_cast<const uint32_t*>(p.rows + index);
    reinterpret_cast<uint32_t*>(&Block().asked)[threadIdx.x] = from[threadIdx.x];
  }
  __syncthreads();
  const WholeRow& asked = Block().asked;
  const int64_t size = p.vocab_size;
  const uint32_t* mask = asked.mask == WholeRow::kMaskLate ? p.late_masks : p.masks;
  return {.p = p,
          .part = part,
          .parts = parts,
          .begin = static_cast<int32_t>(size * part / parts),
          .end = static_cast<int32_t>(size * (part + 1) / parts),
          .logits = p.logits + (asked.row - p.first_row) * size,
          .counts = asked.penalized != 0 ? p.counts + asked.slot * size : nullptr,
          .mask = asked.mask == WholeRow::kNoMask ? nullptr : mask + asked.mask_begin,
          .sparse_count = asked.bias_count + asked.forbidden_count + asked.draft_count,
          .keeps_values = keeps_values};
}

}  // namespace nibble::cuda
