// Matrix products of a warpgroup on Hopper's tensor cores: A from registers, B from shared memory.
// Exists only in code for sm_90a.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nibble::cuda::NIBBLE_ELEMENT {

// The registers of an operation in flight must not be touched: call before the first one, and after
// other instructions have written accumulators or fragments.
__device__ __forceinline__ void WarpgroupFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void WarpgroupCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// At most kPending committed groups are still running.
template <int32_t kPending>
__device__ __forceinline__ void WarpgroupWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving what it does with these registers over this place.
template <int32_t kCount>
__device__ __forceinline__ void PinRegisters(int32_t (&values)[kCount]) {
#pragma unroll
  for (int32_t i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}
template <int32_t kCount>
__device__ __forceinline__ void PinRegisters(float (&values)[kCount]) {
#pragma unroll
  for (int32_t i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
template <int32_t kCount>
__device__ __forceinline__ void PinRegisters(uint32_t (&values)[kCount]) {
#pragma unroll
  for (int32_t i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

// Warpgroups share 64 K registers as they need them; `kCount` a thread, a multiple of 8.
template <int32_t kCount>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int32_t kCount>
__device__ __forceinline__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// A cluster's blocks meet; what each wrote to shared memory before is visible behind it.
__device__ __forceinline__ void ArriveCluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void WaitForCluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Where what lies at an address of this block's shared memory lies in another block's.
__device__ __forceinline__ uint32_t AddressAt(uint32_t shared, int32_t block) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(block));
  return there;
}
// One of the arrivals of a barrier of any block of the cluster.
__device__ __forceinline__ void ArriveIf(bool arrives, uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred arrives;\nsetp.ne.s32 arrives, %1, 0;\n"
      "@arrives mbarrier.arrive.shared::cluster.b64 _, [%0];\n}" ::"r"(barrier),
      "r"(static_cast<int32_t>(arrives))
      : "memory");
}
// A copy into the same place in the shared memory of every block in `blocks` (a bit each), which
// completes on the barriers of each.
__device__ __forceinline__ void BulkCopyToBlocks(void* shared, const void* global, int32_t bytes,
                                                 uint64_t* barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;" ::"r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier)), "h"(blocks)
      : "memory");
}

// B as rows of 64 fp16 along k, 128 bytes each: 16-byte chunk i of row n lies at i ^ (n % 8). The
// address is of 1024 bytes' alignment, or 32 bytes further for each step of 16 k.
__device__ __forceinline__ uint64_t SwizzledRows(uint32_t shared_address) {
  constexpr uint32_t kEightRows = 1024 >> 4;
  constexpr uint32_t kSwizzle128 = 1;
  const uint32_t low = shared_address >> 4 | uint32_t{1} << 16;
  return uint64_t{kEightRows | kSwizzle128 << 30} << 32 | low;
}

// The same of a place that all lanes know. Taken from one of them: the compiler then sees that it
// is one, and reckons what follows from it in uniform registers, where the tensor cores want it.
__device__ __forceinline__ uint64_t UniformRows(const void* shared) {
  return SwizzledRows(__shfl_sync(0xffffffffu, SharedAddress(shared), 0));
}
// The same so many bytes further, a multiple of 16.
__device__ __forceinline__ uint64_t Further(uint64_t rows, int32_t bytes) {
  const auto low = static_cast<uint32_t>(rows) + static_cast<uint32_t>(bytes / 16);
  return rows >> 32 << 32 | low;
}

// d[64, kN] += a[64, 16] * b[16, kN]; fragments as those of mma.m16n8k16, 16 rows a warp. In shared
// memory b's rows are its columns, of kN, along k; with kRowsAreK they are its rows. kFirst: what d
// held before counts for nothing.
template <int32_t kN>
struct WarpgroupMma;

#define NIBBLE_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define NIBBLE_D16(i) NIBBLE_D8(i), NIBBLE_D8(i + 8)
#define NIBBLE_D32(i) NIBBLE_D16(i), NIBBLE_D16(i + 16)

template <>
struct WarpgroupMma<16> {
  template <bool kRowsAreK = false, bool kFirst = false>
  static __device__ __forceinline__ void Add(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.eq.u32 adds, %14, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." NIBBLE_ELEMENT_TEXT "." NIBBLE_ELEMENT_TEXT
        " "
        "{%0,%1,%2,%3,%4,%5,%6,%7}, "
        "{%8,%9,%10,%11}, %12, adds, 1, 1, %13;\n}"
        : NIBBLE_D8(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRowsAreK ? 1 : 0),
          "n"(kFirst ? 1 : 0));
  }
};

template <>
struct WarpgroupMma<32> {
  template <bool kRowsAreK = false, bool kFirst = false>
  static __device__ __forceinline__ void Add(float (&d)[16], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.eq.u32 adds, %22, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." NIBBLE_ELEMENT_TEXT "." NIBBLE_ELEMENT_TEXT
        " "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
        "{%16,%17,%18,%19}, %20, adds, 1, 1, %21;\n}"
        : NIBBLE_D16(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRowsAreK ? 1 : 0),
          "n"(kFirst ? 1 : 0));
  }
};

template <>
struct WarpgroupMma<64> {
  template <bool kRowsAreK = false, bool kFirst = false>
  static __device__ __forceinline__ void Add(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.eq.u32 adds, %38, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NIBBLE_ELEMENT_TEXT "." NIBBLE_ELEMENT_TEXT
        " "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,"
        "%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "{%32,%33,%34,%35}, %36, adds, 1, 1, %37;\n}"
        : NIBBLE_D32(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRowsAreK ? 1 : 0),
          "n"(kFirst ? 1 : 0));
  }
};

template <>
struct WarpgroupMma<96> {
  template <bool kRowsAreK = false, bool kFirst = false>
  static __device__ __forceinline__ void Add(float (&d)[48], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.eq.u32 adds, %54, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k16.f32." NIBBLE_ELEMENT_TEXT "." NIBBLE_ELEMENT_TEXT
        " "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,"
        "%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,"
        "%43,%44,%45,%46,%47}, "
        "{%48,%49,%50,%51}, %52, adds, 1, 1, %53;\n}"
        : NIBBLE_D32(0), NIBBLE_D16(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRowsAreK ? 1 : 0),
          "n"(kFirst ? 1 : 0));
  }
};

template <>
struct WarpgroupMma<128> {
  template <bool kRowsAreK = false, bool kFirst = false>
  static __device__ __forceinline__ void Add(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.eq.u32 adds, %70, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NIBBLE_ELEMENT_TEXT "." NIBBLE_ELEMENT_TEXT
        " "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,"
        "%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,"
        "%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,"
        "%63}, "
        "{%64,%65,%66,%67}, %68, adds, 1, 1, %69;\n}"
        : NIBBLE_D32(0), NIBBLE_D32(32)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRowsAreK ? 1 : 0),
          "n"(kFirst ? 1 : 0));
  }
};

template <>
struct WarpgroupMma<256> {
  template <bool kRowsAreK = false, bool kFirst = false>
  static __device__ __forceinline__ void Add(float (&d)[128], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.eq.u32 adds, %134, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." NIBBLE_ELEMENT_TEXT "." NIBBLE_ELEMENT_TEXT
        " "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
        "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,"
        "%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,"
        "%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,"
        "%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,"
        "%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,"
        "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
        "{%128,%129,%130,%131}, %132, adds, 1, 1, %133;\n}"
        : NIBBLE_D32(0), NIBBLE_D32(32), NIBBLE_D32(64), NIBBLE_D32(96)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRowsAreK ? 1 : 0),
          "n"(kFirst ? 1 : 0));
  }
};

// d[64, kN] += a[64, 32] * b[32, kN] of unsigned and signed bytes, exactly; otherwise as above.
template <int32_t kN>
struct WarpgroupMmaBytes;

#define NIBBLE_I8(i)                                                                          \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), \
      "+r"(d[i + 6]), "+r"(d[i + 7])
#define NIBBLE_I16(i) NIBBLE_I8(i), NIBBLE_I8(i + 8)

template <>
struct WarpgroupMmaBytes<32> {
  template <bool kFirst>
  static __device__ __forceinline__ void Add(int32_t (&d)[16], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "{\n.reg .pred adds;\nsetp.eq.u32 adds, %21, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
        "{%16,%17,%18,%19}, %20, adds;\n}"
        : NIBBLE_I16(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kFirst ? 1 : 0));
  }
};

#undef NIBBLE_I8
#undef NIBBLE_I16
#undef NIBBLE_D8
#undef NIBBLE_D16
#undef NIBBLE_D32

}  // namespace nibble::cuda::NIBBLE_ELEMENT
