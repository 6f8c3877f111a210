// What the integer products of the AVX-512 and AMX levels share. In an unnamed namespace: each
// translation unit has its own copy.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/unroll.h"

namespace nibble::cpu {
namespace {

inline constexpr int32_t kBlockRows = 16;

NIBBLE_INLINE inline int32_t Min(int32_t a, int32_t b) { return a < b ? a : b; }

NIBBLE_INLINE inline __mmask16 RowMask(int32_t rows, int32_t block) {
  const int32_t left = rows - block * kBlockRows;
  return left >= kBlockRows ? static_cast<__mmask16>(0xffff)
                            : static_cast<__mmask16>((1U << left) - 1U);
}

NIBBLE_INLINE inline __m512 LoadScales(const void* scales, int64_t index, ElementType type) {
  if (type == ElementType::kF32) {
    return _mm512_loadu_ps(static_cast<const float*>(scales) + index);
  }
  const uint16_t* half = static_cast<const uint16_t*>(scales) + index;
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
}

// What dpwssd multiplies by the sums of x: -z in the low 16 bits of each lane; above, 0 with one
// term, -256 * z with two.
NIBBLE_INLINE inline __m512i NegatedZeros(const uint8_t* zeros, int32_t terms) {
  const __m512i z = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
  const __m512i negated = _mm512_sub_epi32(_mm512_setzero_si512(), z);
  const __m512i low = _mm512_and_si512(negated, _mm512_set1_epi32(0xffff));
  if (terms == 1) return low;
  return _mm512_or_si512(low, _mm512_slli_epi32(negated, 24));
}

// acc + the products of both 16-bit halves of each lane.
NIBBLE_INLINE inline __m512i AddZeroTerm(__m512i acc, __m512i zeros, __m512i sums) {
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(zeros), "v"(sums));
  return acc;
}

// fma(scales * scale of x, float(acc), sum)
NIBBLE_INLINE inline __m512 Scaled(__m512i acc, __m512 scales, float x_scale, __m512 sum) {
  return _mm512_fmadd_ps(_mm512_mul_ps(scales, _mm512_set1_ps(x_scale)), _mm512_cvtepi32_ps(acc),
                         sum);
}

NIBBLE_INLINE inline void StoreRows(const GemmOutput& y, int32_t token, int32_t block,
                                    __mmask16 mask, __m512 sum) {
  if (y.bias != nullptr) {
    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, y.bias + block * kBlockRows));
  }
  _mm512_mask_storeu_ps(y.values + token * y.stride + block * kBlockRows, mask, sum);
}

// Nibbles of kBlocks row blocks and some columns -> bytes [vector][row block][64], each packed
// vector giving two; scales and negated zeros -> [group][row block][16]. All 64-byte aligned.
struct UnpackedW4 {
  uint8_t* bytes = nullptr;
  float* scales = nullptr;
  int32_t* zeros = nullptr;
};

template <int kBlocks>
void UnpackW4(const W4Matrix& w, int32_t first_block, int32_t first_column, int32_t columns,
              int32_t terms, const UnpackedW4& panel) {
  const __m512i low_mask = _mm512_set1_epi8(0x0f);
  const int32_t groups = w.columns / w.group;
  const int64_t block_bytes = static_cast<int64_t>(w.columns) * kBlockRows / 2;
  const int64_t ahead = kBlocks * block_bytes;  // asked for while these are multiplied
  const uint8_t* from = w.nibbles + first_block * block_bytes + first_column * kBlockRows / 2;
  uint8_t* to = panel.bytes;
  for (int32_t v = 0; v < columns / 8; ++v) {
    Unroll<kBlocks>([&](auto r) NIBBLE_INLINE {
      const __m512i packed = _mm512_loadu_si512(from + r * block_bytes);
      Prefetch(from + r * block_bytes, ahead);
      _mm512_store_si512(to + r * 64, _mm512_and_si512(packed, low_mask));
      _mm512_store_si512(to + (kBlocks + r) * 64,
                         _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_mask));
    });
    from += 64;
    to += 2 * kBlocks * 64;
  }
  for (int32_t g = 0; g < columns / w.group; ++g) {
    for (int32_t r = 0; r < kBlocks; ++r) {
      const int64_t entry =
          ((first_block + r) * static_cast<int64_t>(groups) + first_column / w.group + g) *
          kBlockRows;
      const int32_t target = (g * kBlocks + r) * kBlockRows;
      _mm512_store_ps(panel.scales + target, LoadScales(w.scales, entry, w.scale_type));
      _mm512_store_si512(panel.zeros + target, NegatedZeros(w.zeros + entry, terms));
    }
  }
}

}  // namespace
}  // namespace nibble::cpu
