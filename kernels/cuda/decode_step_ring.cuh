// How the decode step's kernel gets its weights and KV blocks: rings of slots in shared memory,
// each of them one stream of pieces for the whole step.
//
// A ring serves the consumer warps of one scheduler and is filled by one producer warp in the order
// in which they use it: a single thread is too slow for all. A producer keeps only a window of
// pieces on their way from memory: with more, whatever else goes there (activations, the meetings
// of blocks) queues behind them, and memory is no faster for it.
#pragma once

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/w4_decode_stream.cuh"

namespace nibble::cuda::step {

constexpr int32_t kConsumers = 16;  // warps
constexpr int32_t kConsumerThreads = kConsumers * 32;
// A warpgroup more feeds them: registers change hands by warpgroups.
constexpr int32_t kThreads = kConsumerThreads + 128;
constexpr int32_t kGroup = 128;  // of quantized products
constexpr int32_t kRings = 4;
constexpr int32_t kRingWarps = kConsumers / kRings;  // warp w has ring w % kRings
constexpr int32_t kWarpSlabs = 2;                    // of a chunk
constexpr int32_t kRingSlabs = kWarpSlabs * kRingWarps;
constexpr int32_t kChunkSlabs = kWarpSlabs * kConsumers;  // of a row tile, multiplied at a time

// Polls of a wait before the kernel gives up: a fault must not hang the device.
constexpr uint32_t kPollsMax = 1u << 22;

[[nodiscard]] __device__ __forceinline__ bool BarrierTry(uint32_t barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(phase)
      : "memory");
  return done != 0;
}
__device__ __forceinline__ void WaitOrFail(uint32_t barrier, uint32_t phase) {
  for (uint32_t polls = 0; !BarrierTry(barrier, phase); ++polls) {
    if (polls == kPollsMax) __trap();
  }
}
__device__ __forceinline__ void Arrive(uint32_t barrier, int32_t count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count)
               : "memory");
}

// How a ring's part of a chunk of a row tile is cut: one piece, or where slabs are large one for
// each of the ring's warps.
template <bool kDense>
struct Pieces {
  static constexpr int32_t kSlabBytes =
      kDense ? decode::kDenseSlabBytes : layout::GpuSlabBytes(kGroup);
  static constexpr int32_t kSlabs = kDense ? kWarpSlabs : kRingSlabs;  // of a piece
  static constexpr int32_t kBytes = kSlabs * kSlabBytes;
  static constexpr int32_t kWarps = kSlabs / kWarpSlabs;  // that use one
  // Of so many slabs.
  static __device__ __forceinline__ int32_t Count(int32_t slabs) {
    return max(0, slabs + kSlabs - 1) / kSlabs;
  }
};

// The slabs of a chunk that a warp multiplies begin here.
__device__ __forceinline__ int32_t FirstSlab(int32_t warp) {
  return warp % kRings * kRingSlabs + warp / kRings * kWarpSlabs;
}

constexpr int32_t kSlotBytes = Pieces<false>::kBytes;
static_assert(kSlotBytes >= Pieces<true>::kBytes);
constexpr int32_t kSlots = 5;  // of a ring
static_assert(kSlots > kRingWarps);

// Shared memory of the block. Addresses in it are offsets, so that they need no registers.
extern __shared__ __align__(128) uint8_t memory[];
constexpr int32_t kRingBytes = kSlots * kSlotBytes;
// Where the rings lie, and their slots' barriers: full ones, then empty ones, [ring][slot] each.
constexpr int32_t kRingsAt = 0;
constexpr int32_t kBarriersAt = kRingsAt + kRings * kRingBytes;
constexpr int32_t kBarrierBytes = kRings * kSlots * 8;  // of either
constexpr int32_t kRestAt = kBarriersAt + 2 * kBarrierBytes;

// Of a warp.
struct Ring {
  int32_t slots;      // offset of the first
  uint32_t barriers;  // address of the full ones
  __device__ __forceinline__ explicit Ring(int32_t number)
      : slots(kRingsAt + number * kRingBytes),
        barriers(SharedAddress(memory + kBarriersAt) + static_cast<uint32_t>(number * kSlots * 8)) {
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t Full(int32_t slot) const {
    return barriers + static_cast<uint32_t>(slot) * 8;
  }
  [[nodiscard]] __device__ __forceinline__ uint32_t Empty(int32_t slot) const {
    return Full(slot) + kBarrierBytes;
  }
};

// A place in the stream of pieces.
struct Cursor {
  int32_t slot = 0;
  uint32_t phase = 0;

  [[nodiscard]] __device__ __forceinline__ Cursor Ahead(int32_t pieces) const {
    Cursor to{slot + pieces, phase};
    if (to.slot >= kSlots) {
      to.slot -= kSlots;
      to.phase ^= 1;
    }
    return to;
  }
  // Returns where the piece lies.
  [[nodiscard]] __device__ __forceinline__ int32_t Wait(const Ring& ring) const {
    WaitOrFail(ring.Full(slot), phase);
    return ring.slots + slot * kSlotBytes;
  }
};

// One lane of a producer warp.
class Producer {
 public:
  __device__ __forceinline__ Producer(const Ring& ring, int32_t number, int32_t window)
      : ring_(ring), number_(number), window_(window), policy_(EvictFirstPolicy()) {}

  // A warp must not wait for a piece whose slot may still have the phase before the last: it may be
  // as far ahead of the oldest piece on its way as its pieces are apart.
  __device__ __forceinline__ void KeepApart(int32_t pieces) {
    limit_ = min(window_, kSlots - pieces);
  }

  // Makes room for the next piece; returns where it goes.
  __device__ __forceinline__ uint32_t Begin(int32_t bytes) {
    if (filled_) WaitOrFail(ring_.Empty(next_.slot), next_.phase ^ 1);
    for (; ahead_ >= limit_; --ahead_) {
      WaitOrFail(ring_.Full(last_.slot), last_.phase);
      last_ = last_.Ahead(1);
    }
    ++ahead_;
    BarrierExpect(ring_.Full(next_.slot), bytes);
    return SharedAddress(memory) + static_cast<uint32_t>(ring_.slots + next_.slot * kSlotBytes);
  }
  __device__ __forceinline__ void Copy(uint32_t to, const void* from, int32_t bytes) const {
    BulkCopy(to, from, bytes, ring_.Full(next_.slot), policy_);
  }
  __device__ __forceinline__ void End() {
    next_ = next_.Ahead(1);
    if (next_.slot == 0) filled_ = true;
  }

  template <bool kDense>
  __device__ __forceinline__ void Product(const uint8_t* slabs_at, int32_t rows, int32_t columns) {
    using P = Pieces<kDense>;
    const int32_t slabs = layout::GpuSlabs(columns);
    const int32_t tiles = decode::TileCount(rows);
    KeepApart(kRingWarps / P::kWarps);
    for (int32_t first = 0; first < tiles; first += 2) {
      for (int32_t begin = number_ * kRingSlabs; begin < slabs; begin += kChunkSlabs) {
        const int32_t count = min(kRingSlabs, slabs - begin);
        for (int32_t tile = first; tile < min(first + 2, tiles); ++tile) {
          const uint8_t* from =
              slabs_at +
              (static_cast<int64_t>(decode::RowTile(tile)) * slabs + begin) * P::kSlabBytes;
          for (int32_t slab = 0; slab < count; slab += P::kSlabs) {
            const int32_t bytes = min(P::kSlabs, count - slab) * P::kSlabBytes;
            Copy(Begin(bytes), from + slab * P::kSlabBytes, bytes);
            End();
          }
        }
      }
    }
  }

 private:
  const Ring ring_;
  const int32_t number_;
  const int32_t window_;  // pieces
  int32_t limit_ = 1;
  const uint64_t policy_;
  Cursor next_, last_;   // last_: the oldest on its way
  int32_t ahead_ = 0;    // pieces from last_ to next_
  bool filled_ = false;  // every slot once
};

}  // namespace nibble::cuda::step
