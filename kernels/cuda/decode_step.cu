#include "kernels/cuda/decode_step.h"

#include "kernels/cuda/decode_step_product.cuh"
#include "kernels/cuda/decode_step_ring.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace nibble::cuda {
namespace {

using namespace step;

constexpr int32_t kTargetAt = (kProductEnd + 7) / 8 * 8;
constexpr int32_t kSharedBytes = kTargetAt + 8;
static_assert(kSharedBytes <= 227 * 1024);

// Where all blocks meet: a counter that never goes back.
__device__ __forceinline__ uint64_t LoadArrivals(const uint64_t* arrivals) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(arrivals) : "memory");
  return value;
}
// By one thread, before the first meeting: blocks may have come to it, but none can have left.
__device__ __forceinline__ void BeginMeetings(const DecodeStepParams& p) {
  const uint64_t now = LoadArrivals(p.arrivals);
  *At<uint64_t>(kTargetAt) = now - now % gridDim.x;
}
// Every consumer. What any block wrote before is visible behind it.
__device__ __forceinline__ void MeetAll(const DecodeStepParams& p) {
  Meet();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(p.arrivals) : "memory");
    const uint64_t target = *At<uint64_t>(kTargetAt) + gridDim.x;
    *At<uint64_t>(kTargetAt) = target;
    for (uint32_t polls = 0; LoadArrivals(p.arrivals) < target; ++polls) {
      if (polls == kPollsMax) __trap();
    }
  }
  Meet();
}

// A phase's description into shared memory, by one warp.
__device__ __forceinline__ void LoadPhase(const DecodeStepParams& p, int32_t phase, Phase* to,
                                          int32_t lane) {
  constexpr int32_t kWords = static_cast<int32_t>(sizeof(StepPhase) / 16);
  static_assert(kWords <= 32);
  if (phase >= p.phase_count) return;
  if (lane < kWords) {
    reinterpret_cast<uint4*>(&to->given)[lane] =
        __ldg(reinterpret_cast<const uint4*>(p.phases + phase) + lane);
  }
  __syncwarp();
  if (lane != 0) return;
  W4DecodeParams& product = to->given.product;
  product.tokens = p.tokens;
  const int32_t slabs = layout::GpuSlabs(product.columns);
  to->shape = {.slabs = slabs,
               .chunks = (slabs + kChunkSlabs - 1) / kChunkSlabs,
               .tiles = decode::TileCount(product.rows)};
}

__device__ __forceinline__ void Produce(const DecodeStepParams& p, const Ring& ring,
                                        int32_t number) {
  Producer producer(ring, number, p.window);
  struct Matrix {
    const uint8_t* slabs;
    int32_t rows, columns, group;
  };
  const auto load = [&](int32_t phase) {
    const W4DecodeParams& from = p.phases[phase < p.phase_count ? phase : 0].product;
    const auto slabs = __ldg(reinterpret_cast<const unsigned long long*>(&from.slabs));
    return Matrix{reinterpret_cast<const uint8_t*>(slabs), __ldg(&from.rows), __ldg(&from.columns),
                  __ldg(&from.group)};
  };
  Matrix next = load(0);
  for (int32_t phase = 0; phase < p.phase_count; ++phase) {
    const Matrix matrix = next;
    next = load(phase + 1);
    if (matrix.group == 0) {
      producer.Product<true>(matrix.slabs, matrix.rows, matrix.columns);
    } else {
      producer.Product<false>(matrix.slabs, matrix.rows, matrix.columns);
    }
  }
}

__device__ __forceinline__ void Consume(const DecodeStepParams& p, int32_t warp, int32_t lane) {
  const Ring ring(warp % kRings);
  const StepShape step(p.tokens);
  Cursor cursor;
  if (threadIdx.x == 0) BeginMeetings(p);
  if (warp == 0) LoadPhase(p, 0, At<Phase>(kPhasesAt), lane);
  Meet();
#pragma unroll 1
  for (int32_t phase = 0; phase < p.phase_count; ++phase) {
    if (phase > 0) MeetAll(p);
    if (warp == kConsumers - 1) {
      LoadPhase(p, phase + 1, At<Phase>(kPhasesAt) + (phase + 1) % 2, lane);
    }
    Multiply(At<Phase>(kPhasesAt)[phase % 2], step, ring, warp, lane, &cursor);
  }
}

// What the block is launched with, 96 registers a thread, is all that there is to share out.
constexpr int32_t kProducerRegisters = 56;
constexpr int32_t kConsumerRegisters = 104;
static_assert(128 * kProducerRegisters + kConsumerThreads * kConsumerRegisters <= kThreads * 96);

__global__ void __launch_bounds__(kThreads, 1)
    DecodeStepKernel(const __grid_constant__ DecodeStepParams p) {
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x < kRings * kSlots) {
    BarrierInit(At<uint64_t>(kBarriersAt) + threadIdx.x, 1);
    BarrierInit(At<uint64_t>(kBarriersAt + kBarrierBytes) + threadIdx.x, kRingWarps);
    FenceBarrierInit();
  }
  __syncthreads();
  if (warp >= kConsumers) {
    GiveRegisters<kProducerRegisters>();
    if (lane == 0) Produce(p, Ring(warp % kRings), warp % kRings);
  } else {
    TakeRegisters<kConsumerRegisters>();
    Consume(p, warp, lane);
  }
}

constexpr int32_t kWindow = 1;

}  // namespace

bool DecodeStepTakes(const StepPhase& phase, int32_t multiprocessors) {
  const W4DecodeParams& p = phase.product;
  const bool whole = p.columns % layout::kGpuSlabColumns == 0;
  const int32_t tiles = layout::GpuRowTiles(p.rows);
  return (p.group == 0 || p.group == kGroup) && p.columns % 8 == 0 && p.rows % 8 == 0 &&
         (whole || layout::GpuSlabs(p.columns) <= kChunkSlabs) && p.normed.parts <= kSquaresMax &&
         (p.output != DecodeOutput::kAddResidual || tiles <= kTilesAdded * multiprocessors);
}

cudaError_t DecodeStep(const DecodeStepParams& params, int32_t multiprocessors,
                       cudaStream_t stream) {
  if (params.tokens < 1 || params.tokens > kDecodeStepTokens) return cudaErrorInvalidValue;
  const cudaError_t error = cudaFuncSetAttribute(
      DecodeStepKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  DecodeStepParams given = params;
  if (given.window == 0) given.window = kWindow;
  return LaunchKernel(DecodeStepKernel,
                      {.grid = dim3(static_cast<uint32_t>(multiprocessors)),
                       .block = dim3(kThreads),
                       .shared_bytes = kSharedBytes,
                       .stream = stream,
                       .cooperative = true},
                      given);
}

}  // namespace nibble::cuda
