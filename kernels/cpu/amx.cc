// The AMX level: products of many tokens with int8 tiles, all else as at the AVX-512 level.
#include "kernels/cpu/amx_products.h"
#include "kernels/cpu/avx512.h"
#include "kernels/cpu/levels.h"

namespace nibble::cpu {
namespace {

// The tile registers. As assembler: GCC 12's intrinsics do not say that they read memory, so that
// the stores which fill a panel could move past them.
struct AmxTiles {
  NIBBLE_INLINE void Configure(const TileConfig& config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  NIBBLE_INLINE void Release() { __asm__ volatile("tilerelease"); }
  template <int kTile>
  NIBBLE_INLINE void Zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  NIBBLE_INLINE void Load(const void* from, int64_t row_stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(from), "r"(row_stride), "i"(kTile)
                     : "memory");
  }
  template <int kTile>
  NIBBLE_INLINE void Store(void* to, int64_t row_stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                     :
                     : "r"(to), "r"(row_stride), "i"(kTile)
                     : "memory");
  }
  // Signed bytes of kLeft times unsigned bytes of kRight, added to kResult.
  template <int kResult, int kLeft, int kRight>
  NIBBLE_INLINE void Dot() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0"
                     :
                     : "i"(kResult), "i"(kLeft), "i"(kRight));
  }
};

void GemmW4Int8Amx(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
                   BlockRange blocks) {
  MultiplyW4AmxAndRest<AmxTiles>(w, x, y, blocks, GemmW4Int8Avx512);
}

}  // namespace

Kernels AmxKernels() {
  Kernels kernels = kAvx512Kernels;
  kernels.level = IsaLevel::kAmx;
  kernels.gemm_w4_int8 = GemmW4Int8Amx;
  return kernels;
}

}  // namespace nibble::cpu
