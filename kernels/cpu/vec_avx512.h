// 16 floats in one AVX-512 register, with the operations that the shared loops need.
// Included by AVX-512 translation units only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/unroll.h"

namespace nibble::cpu {
namespace {

// Register tiles: 24 accumulators of 32 registers.
inline constexpr int kAttentionRows = 6;
inline constexpr int kAttentionVecs = 4;
inline constexpr int kDenseBlocks = 4;
inline constexpr int kDenseTokens = 6;
inline constexpr int kDirectTokensMax = 4;  // above, float products go through a panel

using Vec = __m512;
using IntVec = __m512i;

NIBBLE_INLINE inline __mmask16 FirstLanes(int n) { return static_cast<__mmask16>((1U << n) - 1U); }
NIBBLE_INLINE inline Vec Zero() { return _mm512_setzero_ps(); }
NIBBLE_INLINE inline Vec Set(float x) { return _mm512_set1_ps(x); }
NIBBLE_INLINE inline Vec Load(const float* p) { return _mm512_loadu_ps(p); }
NIBBLE_INLINE inline Vec LoadFirst(const float* p, int n) {
  return _mm512_maskz_loadu_ps(FirstLanes(n), p);
}
NIBBLE_INLINE inline void Store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
NIBBLE_INLINE inline void StoreFirst(float* p, int n, Vec x) {
  _mm512_mask_storeu_ps(p, FirstLanes(n), x);
}
NIBBLE_INLINE inline Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
NIBBLE_INLINE inline Vec Sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
NIBBLE_INLINE inline Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
NIBBLE_INLINE inline Vec Div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
NIBBLE_INLINE inline Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// b where either is NaN.
NIBBLE_INLINE inline Vec Max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
NIBBLE_INLINE inline Vec Min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
// The float whose exponent field is the low 8 bits of x.
NIBBLE_INLINE inline Vec ShiftToExponent(Vec x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23));
}
// Lanes [from, to) of a, the others of b.
NIBBLE_INLINE inline Vec Select(int from, int to, Vec a, Vec b) {
  return _mm512_mask_mov_ps(b, static_cast<__mmask16>(FirstLanes(to) & ~FirstLanes(from)), a);
}

// Lanes i and i + 8, then i + 4, i + 2, i + 1.
NIBBLE_INLINE inline float SumLanes(Vec x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
NIBBLE_INLINE inline float MaxLanes(Vec x) { return _mm512_reduce_max_ps(x); }

NIBBLE_INLINE inline Vec LoadHalf(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
NIBBLE_INLINE inline Vec LoadHalf8(const uint16_t* p) {
  return _mm512_cvtph_ps(
      _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
NIBBLE_INLINE inline Vec LoadBFloat(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
NIBBLE_INLINE inline void StoreHalf(uint16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// 64 bytes of packed nibbles: 16 rows x 8 k. Nibbles<j> are those of k = j as floats: the permute
// looks up its table by the low four bits of each lane and ignores the rest.
struct PackedVec {
  __m512i v;
};
NIBBLE_INLINE inline PackedVec LoadPacked(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
template <int kStep>
NIBBLE_INLINE inline Vec Nibbles(PackedVec packed) {
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  constexpr int kShift = kStep % 4 * 8 + kStep / 4 * 4;
  return _mm512_permutexvar_ps(_mm512_srli_epi32(packed.v, kShift), table);
}
NIBBLE_INLINE inline Vec LoadBytes(const uint8_t* p) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

NIBBLE_INLINE inline IntVec ZeroInt() { return _mm512_setzero_si512(); }
NIBBLE_INLINE inline IntVec AddInt(IntVec a, IntVec b) { return _mm512_add_epi32(a, b); }
NIBBLE_INLINE inline IntVec SubInt(IntVec a, IntVec b) { return _mm512_sub_epi32(a, b); }
NIBBLE_INLINE inline IntVec SetInt(int32_t a) { return _mm512_set1_epi32(a); }
NIBBLE_INLINE inline IntVec ShiftLeft8(IntVec a) { return _mm512_slli_epi32(a, 8); }
NIBBLE_INLINE inline IntVec ShiftRight8(IntVec a) { return _mm512_srai_epi32(a, 8); }
NIBBLE_INLINE inline int32_t SumInt(IntVec a) { return _mm512_reduce_add_epi32(a); }
// Bits without the sign; maxima as unsigned integers.
NIBBLE_INLINE inline IntVec Magnitude(Vec x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}
NIBBLE_INLINE inline IntVec MaxInt(IntVec a, IntVec b) { return _mm512_max_epu32(a, b); }
NIBBLE_INLINE inline uint32_t MaxIntLanes(IntVec a) { return _mm512_reduce_max_epu32(a); }
NIBBLE_INLINE inline IntVec ToInt(Vec x) { return _mm512_cvtps_epi32(x); }
// REQUIRES: values in -128 … 127.
NIBBLE_INLINE inline void StoreInt8(int8_t* p, IntVec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}

}  // namespace
}  // namespace nibble::cpu
