// 16 floats in two AVX2 registers, with the operations that the shared loops need.
// Included by AVX2 translation units only.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/unroll.h"

namespace nibble::cpu {
namespace {

// Register tiles: 12 accumulators of 16 registers, two for each Vec.
inline constexpr int kAttentionRows = 3;
inline constexpr int kAttentionVecs = 2;
inline constexpr int kDenseBlocks = 2;
inline constexpr int kDenseTokens = 3;
inline constexpr int kDirectTokensMax = 2;  // above, float products go through a panel

struct Vec {
  __m256 a, b;
};
struct IntVec {
  __m256i a, b;
};

// All ones in lanes first … first + 7 that lie in [from, to).
NIBBLE_INLINE inline __m256i LaneMask(int from, int to, int first) {
  const __m256i lane =
      _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(from), lane),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(to), lane));
}
NIBBLE_INLINE inline Vec Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
NIBBLE_INLINE inline Vec Set(float x) {
  const __m256 v = _mm256_set1_ps(x);
  return {v, v};
}
NIBBLE_INLINE inline Vec Load(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
NIBBLE_INLINE inline Vec LoadFirst(const float* p, int n) {
  return {_mm256_maskload_ps(p, LaneMask(0, n, 0)), _mm256_maskload_ps(p + 8, LaneMask(0, n, 8))};
}
NIBBLE_INLINE inline void Store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
NIBBLE_INLINE inline void StoreFirst(float* p, int n, Vec x) {
  _mm256_maskstore_ps(p, LaneMask(0, n, 0), x.a);
  _mm256_maskstore_ps(p + 8, LaneMask(0, n, 8), x.b);
}
NIBBLE_INLINE inline Vec Add(Vec x, Vec y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
NIBBLE_INLINE inline Vec Sub(Vec x, Vec y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
NIBBLE_INLINE inline Vec Mul(Vec x, Vec y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
NIBBLE_INLINE inline Vec Div(Vec x, Vec y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
NIBBLE_INLINE inline Vec Fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
// y where either is NaN.
NIBBLE_INLINE inline Vec Max(Vec x, Vec y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
NIBBLE_INLINE inline Vec Min(Vec x, Vec y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
// The float whose exponent field is the low 8 bits of x.
NIBBLE_INLINE inline Vec ShiftToExponent(Vec x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.a), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.b), 23))};
}
// Lanes [from, to) of x, the others of y.
NIBBLE_INLINE inline Vec Select(int from, int to, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(LaneMask(from, to, 0))),
          _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(LaneMask(from, to, 8)))};
}

// Lanes i and i + 8, then i + 4, i + 2, i + 1.
NIBBLE_INLINE inline float SumLanes(Vec x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
NIBBLE_INLINE inline float MaxLanes(Vec x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

NIBBLE_INLINE inline __m256 LoadHalf8Lanes(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
NIBBLE_INLINE inline Vec LoadHalf(const uint16_t* p) {
  return {LoadHalf8Lanes(p), LoadHalf8Lanes(p + 8)};
}
NIBBLE_INLINE inline Vec LoadHalf8(const uint16_t* p) {
  return {LoadHalf8Lanes(p), _mm256_setzero_ps()};
}
NIBBLE_INLINE inline __m256 LoadBFloat8Lanes(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
NIBBLE_INLINE inline Vec LoadBFloat(const uint16_t* p) {
  return {LoadBFloat8Lanes(p), LoadBFloat8Lanes(p + 8)};
}
NIBBLE_INLINE inline void StoreHalf(uint16_t* p, Vec x) {
  const __m128i low = _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT);
  const __m128i high = _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), low);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), high);
}

// 64 bytes of packed nibbles: 16 rows x 8 k. Nibbles<j> are those of k = j as floats.
struct PackedVec {
  __m256i a, b;
};
NIBBLE_INLINE inline PackedVec LoadPacked(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
template <int kStep>
NIBBLE_INLINE inline Vec Nibbles(PackedVec packed) {
  constexpr int kShift = kStep % 4 * 8 + kStep / 4 * 4;
  const __m256i mask = _mm256_set1_epi32(15);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(packed.a, kShift), mask)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(packed.b, kShift), mask))};
}
NIBBLE_INLINE inline Vec LoadBytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

NIBBLE_INLINE inline IntVec ZeroInt() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
NIBBLE_INLINE inline IntVec AddInt(IntVec x, IntVec y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
NIBBLE_INLINE inline IntVec SubInt(IntVec x, IntVec y) {
  return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)};
}
NIBBLE_INLINE inline IntVec SetInt(int32_t x) {
  return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
}
NIBBLE_INLINE inline IntVec ShiftLeft8(IntVec x) {
  return {_mm256_slli_epi32(x.a, 8), _mm256_slli_epi32(x.b, 8)};
}
NIBBLE_INLINE inline IntVec ShiftRight8(IntVec x) {
  return {_mm256_srai_epi32(x.a, 8), _mm256_srai_epi32(x.b, 8)};
}
NIBBLE_INLINE inline int32_t SumInt(IntVec x) {
  const __m256i eight = _mm256_add_epi32(x.a, x.b);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
// Bits without the sign; maxima as unsigned integers.
NIBBLE_INLINE inline IntVec Magnitude(Vec x) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256(_mm256_castps_si256(x.a), mask),
          _mm256_and_si256(_mm256_castps_si256(x.b), mask)};
}
NIBBLE_INLINE inline IntVec MaxInt(IntVec x, IntVec y) {
  return {_mm256_max_epu32(x.a, y.a), _mm256_max_epu32(x.b, y.b)};
}
NIBBLE_INLINE inline uint32_t MaxIntLanes(IntVec x) {
  const __m256i eight = _mm256_max_epu32(x.a, x.b);
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  return static_cast<uint32_t>(
      _mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1))));
}
NIBBLE_INLINE inline IntVec ToInt(Vec x) {
  return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)};
}
// REQUIRES: values in -128 … 127.
NIBBLE_INLINE inline void StoreInt8(int8_t* p, IntVec x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}

}  // namespace
}  // namespace nibble::cpu
