// Integer products with AVX2.
//
// Half a row block (8 rows) x up to 4 tokens at a time. maddubs adds two products in 16 bits; with
// 4-bit weights (at most 15 * 127 * 2 = 3810) eight such results fit before they must be widened,
// which is exactly 32 columns (with the lows of two terms: 15 * 128 * 2 = 3840). 8-bit weights are
// split into two nibbles for the same reason.
#include <immintrin.h>

#include <cstdint>

#include "kernels/cpu/avx2.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/unroll.h"

namespace nibble::cpu {
namespace {

constexpr int32_t kBlockRows = 16;
constexpr int32_t kHalfRows = 8;
constexpr int32_t kHeadGroup = 32;
constexpr int32_t kTileTokens = 4;

NIBBLE_INLINE inline __m256i LoadBytes32(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

NIBBLE_INLINE inline __m256i Broadcast4(const int8_t* x) {
  int32_t four = 0;
  __builtin_memcpy(&four, x, sizeof(four));
  return _mm256_set1_epi32(four);
}

NIBBLE_INLINE inline __m256 LoadScales(const void* scales, int64_t index, ElementType type) {
  if (type == ElementType::kF32) return _mm256_loadu_ps(static_cast<const float*>(scales) + index);
  const uint16_t* half = static_cast<const uint16_t*>(scales) + index;
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half)));
}

// z in the lower half of each lane; above, 0 with one term, 256 * z with two.
NIBBLE_INLINE inline __m256i LoadZeros(const uint8_t* zeros, int32_t terms) {
  const __m256i z = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
  return terms == 1 ? z : _mm256_or_si256(z, _mm256_slli_epi32(z, 24));
}

// z * sum of x per row; the sum of each term fits 16 bits.
NIBBLE_INLINE inline __m256i ZeroTerm(__m256i zeros, int32_t sums) {
  return _mm256_madd_epi16(zeros, _mm256_set1_epi32(sums));
}

NIBBLE_INLINE inline __m256 Scaled(__m256i acc, __m256 scales, float x_scale, __m256 sum) {
  return _mm256_fmadd_ps(_mm256_mul_ps(scales, _mm256_set1_ps(x_scale)), _mm256_cvtepi32_ps(acc),
                         sum);
}

void StoreHalfBlock(const GemmOutput& y, int64_t token, int32_t row, int32_t rows, __m256 sum) {
  const int32_t left = rows - row;
  if (left <= 0) return;
  float* to = y.values + token * y.stride + row;
  if (left >= kHalfRows) {
    if (y.bias != nullptr) sum = _mm256_add_ps(sum, _mm256_loadu_ps(y.bias + row));
    _mm256_storeu_ps(to, sum);
    return;
  }
  const __m256i mask =
      _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  if (y.bias != nullptr) sum = _mm256_add_ps(sum, _mm256_maskload_ps(y.bias + row, mask));
  _mm256_maskstore_ps(to, mask, sum);
}

// A tile's place: the weights start at row `row`, the tokens at `token`.
template <int kTokens>
void TileW4(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y, int32_t row,
            int64_t token) {
  const int64_t columns = w.columns;
  const int64_t x_stride = columns * x.terms;
  const int64_t groups = columns / w.group;
  const int64_t block = row / kBlockRows;
  const int32_t half = row % kBlockRows;
  const uint8_t* nibbles = w.nibbles + block * kBlockRows * columns / 2 + half * 4;
  const int8_t* xq = x.values + token * x_stride;
  const __m256i low_mask = _mm256_set1_epi8(0x0f);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 sum[kTokens];
  Unroll<kTokens>([&](auto t) NIBBLE_INLINE { sum[t] = _mm256_setzero_ps(); });
  for (int64_t g = 0; g < groups; ++g) {
    __m256i acc[kTokens];
    Unroll<kTokens>([&](auto t) NIBBLE_INLINE { acc[t] = _mm256_setzero_si256(); });
    for (int32_t term = 0;; ++term) {
      for (int32_t k = 0; k < w.group; k += 32) {
        __m256i words[kTokens];
        Unroll<kTokens>([&](auto t) NIBBLE_INLINE { words[t] = _mm256_setzero_si256(); });
        Unroll<4>([&](auto v) NIBBLE_INLINE {
          const __m256i packed = LoadBytes32(nibbles + v * 64);
          Prefetch(nibbles + v * 64);
          const __m256i low = _mm256_and_si256(packed, low_mask);
          const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low_mask);
          Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
            const int8_t* at = xq + t * x_stride + v * 8;
            words[t] = _mm256_add_epi16(words[t], _mm256_maddubs_epi16(low, Broadcast4(at)));
            words[t] = _mm256_add_epi16(words[t], _mm256_maddubs_epi16(high, Broadcast4(at + 4)));
          });
        });
        Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
          acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(words[t], ones));
        });
        nibbles += 256;
        xq += 32;
      }
      if (term + 1 == x.terms) break;
      Unroll<kTokens>([&](auto t) NIBBLE_INLINE { acc[t] = _mm256_slli_epi32(acc[t], 8); });
      nibbles -= w.group * 8;
      xq += columns - w.group;
    }
    xq -= (x.terms - 1) * columns;
    const int64_t entry = (block * groups + g) * kBlockRows + half;
    const __m256i zeros = LoadZeros(w.zeros + entry, x.terms);
    const __m256 scales = LoadScales(w.scales, entry, w.scale_type);
    Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
      const int64_t at = (token + t) * groups + g;
      sum[t] = Scaled(_mm256_sub_epi32(acc[t], ZeroTerm(zeros, x.sums[at])), scales, x.scales[at],
                      sum[t]);
    });
  }
  Unroll<kTokens>([&](auto t) NIBBLE_INLINE { StoreHalfBlock(y, token + t, row, w.rows, sum[t]); });
}

template <int kTokens>
void TileInt8(const Int8Matrix& w, const Int8Activations& x, const GemmOutput& y, int32_t row,
              int64_t token) {
  const int64_t columns = w.columns;
  const int64_t groups = columns / kHeadGroup;
  const int64_t block = row / kBlockRows;
  const int32_t half = row % kBlockRows;
  const uint8_t* values = w.values + block * kBlockRows * columns + half * 4;
  const int8_t* xq = x.values + token * columns;
  const __m256i low_mask = _mm256_set1_epi8(0x0f);
  __m256 sum[kTokens];
  Unroll<kTokens>([&](auto t) NIBBLE_INLINE { sum[t] = _mm256_setzero_ps(); });
  for (int64_t g = 0; g < groups; ++g) {
    __m256i low_words[kTokens];
    __m256i high_words[kTokens];
    Unroll<kTokens>([&](auto t)
                        NIBBLE_INLINE { low_words[t] = high_words[t] = _mm256_setzero_si256(); });
    Unroll<kHeadGroup / 4>([&](auto v) NIBBLE_INLINE {
      const __m256i bytes = LoadBytes32(values + v * 64);
      Prefetch(values + v * 64);
      const __m256i low = _mm256_and_si256(bytes, low_mask);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low_mask);
      Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
        const __m256i four = Broadcast4(xq + t * columns + v * 4);
        low_words[t] = _mm256_add_epi16(low_words[t], _mm256_maddubs_epi16(low, four));
        high_words[t] = _mm256_add_epi16(high_words[t], _mm256_maddubs_epi16(high, four));
      });
    });
    values += kHeadGroup * kBlockRows;
    xq += kHeadGroup;
    const __m256 scales = _mm256_loadu_ps(w.scales + (block * groups + g) * kBlockRows + half);
    Unroll<kTokens>([&](auto t) NIBBLE_INLINE {
      const int64_t at = (token + t) * groups + g;
      __m256i acc = _mm256_madd_epi16(high_words[t], _mm256_set1_epi16(16));
      acc = _mm256_add_epi32(acc, _mm256_madd_epi16(low_words[t], _mm256_set1_epi16(1)));
      acc = _mm256_sub_epi32(acc, _mm256_set1_epi32(128 * x.sums[at]));
      sum[t] = Scaled(acc, scales, x.scales[at], sum[t]);
    });
  }
  Unroll<kTokens>([&](auto t) NIBBLE_INLINE { StoreHalfBlock(y, token + t, row, w.rows, sum[t]); });
}

// tile(row, token, count as a constant) over all half row blocks and token tiles of equal size.
template <class Body>
NIBBLE_INLINE inline void ForTiles(BlockRange blocks, int32_t tokens, const Body& tile) {
  const int32_t tiles = (tokens + kTileTokens - 1) / kTileTokens;
  for (int32_t row = blocks.begin * kBlockRows; row < blocks.end * kBlockRows; row += kHalfRows) {
    int32_t token = 0;
    for (int32_t i = 0; i < tiles; ++i) {
      const int32_t count = (tokens - token) / (tiles - i);
      Unroll<kTileTokens>([&](auto c) NIBBLE_INLINE {
        constexpr int kCount = decltype(c)::kConstant + 1;
        if (count == kCount) tile(row, token, Index<kCount>{});
      });
      token += count;
    }
  }
}

}  // namespace

void GemmW4Int8Avx2(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
                    BlockRange blocks) {
  ForTiles(blocks, x.tokens, [&](int32_t row, int32_t token, auto count) NIBBLE_INLINE {
    TileW4<decltype(count)::kConstant>(w, x, y, row, token);
  });
}

void GemmInt8Avx2(const Int8Matrix& w, const Int8Activations& x, const GemmOutput& y,
                  BlockRange blocks) {
  ForTiles(blocks, x.tokens, [&](int32_t row, int32_t token, auto count) NIBBLE_INLINE {
    TileInt8<decltype(count)::kConstant>(w, x, y, row, token);
  });
}

}  // namespace nibble::cpu
