// One small function per PTX instruction that the kernels need, with the reason it is here.
#pragma once

#include <cstdint>

namespace nibble::cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void BarrierInit(uint64_t* barrier, int32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals));
}
// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void BarrierExpect(uint32_t barrier, int32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void BarrierExpect(uint64_t* barrier, int32_t bytes) {
  BarrierExpect(SharedAddress(barrier), bytes);
}
// One of a barrier's arrivals.
__device__ __forceinline__ void BarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}
__device__ __forceinline__ void BarrierWait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "RETRY: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra RETRY;\nDONE:\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}
__device__ __forceinline__ void BarrierWait(uint64_t* barrier, uint32_t phase) {
  BarrierWait(SharedAddress(barrier), phase);
}

// Weights are read once a step: they leave the L2 first, so that activations and KV stay.
__device__ __forceinline__ uint64_t EvictFirstPolicy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// What several blocks of a launch read: neither first nor last to leave the L2.
__device__ __forceinline__ uint64_t EvictNormalPolicy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void BulkCopy(uint32_t shared, const void* global, int32_t bytes,
                                         uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void BulkCopy(void* shared, const void* global, int32_t bytes,
                                         uint64_t* barrier, uint64_t policy) {
  BulkCopy(SharedAddress(shared), global, bytes, SharedAddress(barrier), policy);
}

// Sixteen bytes that an earlier kernel wrote, or zeros; keeps its place among waits and other such
// loads. Lanes that lack a value must not load another instead: thousands of loads of one sector
// queue up at its slice of the L2.
__device__ __forceinline__ uint4 LoadIf(bool exists, const void* global) {
  uint4 value;
  asm volatile(
      "{\n.reg .pred exists;\nsetp.ne.s32 exists, %5, 0;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@exists ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(value.x), "=&r"(value.y), "=&r"(value.z), "=&r"(value.w)
      : "l"(global), "r"(static_cast<int32_t>(exists)));
  return value;
}

// The kernel before this one in the stream has finished and its writes are visible. Before Hopper
// no kernel starts earlier.
__device__ __forceinline__ void WaitForPreviousKernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The next kernel may start its prologue (it waits for our end before it reads our results). Said
// after WaitForPreviousKernel, at most two kernels are about at a time.
__device__ __forceinline__ void LetNextKernelStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A number that an earlier kernel wrote, or 0; keeps its place as LoadIf's do. Nobody waits for it
// before it is used.
__device__ __forceinline__ float LoadFloatIf(bool exists, const float* global) {
  float value;
  asm volatile(
      "{\n.reg .pred exists;\nsetp.ne.s32 exists, %2, 0;\n"
      "mov.b32 %0, 0;\n@exists ld.global.f32 %0, [%1];\n}"
      : "=&f"(value)
      : "l"(global), "r"(static_cast<int32_t>(exists)));
  return value;
}
// What another block of the launch may be writing: never from the L1, and every time anew.
__device__ __forceinline__ uint4 LoadRelaxed(const uint4* global) {
  uint4 value;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global)
               : "memory");
  return value;
}
// What a word is until somebody stores it, where words say by themselves that they have come.
inline constexpr uint32_t kNotCome = 0xffffffffu;
__device__ __forceinline__ bool HaveCome(const uint4& words) {
  return words.x != kNotCome && words.y != kNotCome && words.z != kNotCome && words.w != kNotCome;
}
__device__ __forceinline__ uint4 FourNotCome() {
  return make_uint4(kNotCome, kNotCome, kNotCome, kNotCome);
}
__device__ __forceinline__ void PrefetchToL2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// On every lane.
__device__ __forceinline__ float SumOfWarp(float value) {
#pragma unroll
  for (int32_t offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// Four 8x8 matrices of 16-bit numbers from shared memory; lane l names row l % 8 of matrix l / 8,
// and gets elements 2 (l % 4) and the next of row l / 4 of each.
__device__ __forceinline__ void LoadMatrices(uint32_t shared_address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address)
               : "memory");
}
// The same of the transposed matrices.
__device__ __forceinline__ void LoadTransposed(uint32_t shared_address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address)
               : "memory");
}

// Shared memory written by ordinary stores may next be written by the copy engine.
__device__ __forceinline__ void FenceSharedForCopies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// (w & mask) | bits in one instruction: nibbles become numbers (w4_widen.cuh).
template <uint32_t kMask>
__device__ __forceinline__ uint32_t AndOr(uint32_t w, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(w), "n"(kMask), "r"(bits));
  return result;
}
__device__ __forceinline__ uint4 LoadShared128(const void* pointer) {
  return *static_cast<const uint4*>(pointer);
}

}  // namespace nibble::cuda
