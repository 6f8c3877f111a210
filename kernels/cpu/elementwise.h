// Norms, activations, RoPE, quantization and KV writes over Vec (16 floats). Included after one of
// vec_*.h; reference.cc defines the order of operations.
#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/numerics.h"

namespace nibble::cpu {
namespace {

inline constexpr int kLanes = 16;

NIBBLE_INLINE inline Vec Exp(Vec x) {
  x = Min(Set(kExpHighest), Max(Set(kExpLowest), x));
  const Vec shifted = Fma(x, Set(kLog2E), Set(kExpShift));
  const Vec n = Sub(shifted, Set(kExpShift));
  Vec r = Fma(n, Set(-kLn2High), x);
  r = Fma(n, Set(-kLn2Low), r);
  Vec p = Set(kExpTerms[0]);
  Unroll<kExpTermCount - 1>([&](auto i) NIBBLE_INLINE { p = Fma(p, r, Set(kExpTerms[i + 1])); });
  return Mul(p, ShiftToExponent(shifted));
}

// Sixteen values -> their terms; adds these to the sums.
template <int kTerms>
NIBBLE_INLINE inline void StoreTerms(IntVec q, int8_t* out, int32_t columns, IntVec (&sums)[2]) {
  if constexpr (kTerms == 1) {
    StoreInt8(out, q);
    sums[0] = AddInt(sums[0], q);
  } else {
    const IntVec high = ShiftRight8(AddInt(q, SetInt(128)));
    const IntVec low = SubInt(q, ShiftLeft8(high));
    StoreInt8(out, high);
    StoreInt8(out + columns, low);
    sums[0] = AddInt(sums[0], high);
    sums[1] = AddInt(sums[1], low);
  }
}

template <int kTerms>
void QuantizeGroup(const float* in, int32_t group, int32_t columns, int8_t* out, float* scale,
                   int32_t* sum) {
  constexpr float kLimit = kTerms == 1 ? kQuantizeLimit : kQuantizeLimitOfTwo;
  IntVec largest_lanes = ZeroInt();
  for (int32_t k = 0; k < group; k += kLanes) {
    largest_lanes = MaxInt(largest_lanes, Magnitude(Load(in + k)));
  }
  const uint32_t largest_bits = MaxIntLanes(largest_lanes);
  float largest = 0;
  __builtin_memcpy(&largest, &largest_bits, sizeof(largest));
  if (largest_bits >= kInfinityBits || largest < kQuantizeFloor) {
    const uint32_t scale_bits = largest_bits >= kInfinityBits ? kNanBits : 0;
    __builtin_memcpy(scale, &scale_bits, sizeof(*scale));
    for (int term = 0; term < kTerms; ++term) {
      __builtin_memset(out + term * columns, 0, static_cast<size_t>(group));
    }
    *sum = 0;
    return;
  }
  const Vec inverse = Set(kLimit / largest);
  IntVec sums[2] = {ZeroInt(), ZeroInt()};
  for (int32_t k = 0; k < group; k += kLanes) {
    StoreTerms<kTerms>(ToInt(Mul(Load(in + k), inverse)), out + k, columns, sums);
  }
  *scale = largest / kLimit;
  const int32_t first = SumInt(sums[0]);
  *sum = kTerms == 1 ? first : first * 65536 + (SumInt(sums[1]) & 0xffff);
}

template <int kTerms>
void QuantizeRows(const FloatRows& x, const Int8Target& to) {
  const int64_t groups = x.columns / to.group;
  for (int64_t t = 0; t < x.tokens; ++t) {
    for (int64_t g = 0; g < groups; ++g) {
      QuantizeGroup<kTerms>(x.values + t * x.stride + g * to.group, to.group, x.columns,
                            to.values + t * kTerms * x.columns + g * to.group,
                            to.scales + t * groups + g, to.sums + t * groups + g);
    }
  }
}

void Quantize(const FloatRows& x, const Int8Target& to) {
  to.terms == 1 ? QuantizeRows<1>(x, to) : QuantizeRows<2>(x, to);
}

void RmsNorm(const FloatRows& x, const float* weight, float epsilon, float* out,
             int64_t out_stride) {
  constexpr int kVecs = kNormLanes / kLanes;
  for (int64_t t = 0; t < x.tokens; ++t) {
    const float* in = x.values + t * x.stride;
    float* to = out + t * out_stride;
    Vec lanes[kVecs];
    Unroll<kVecs>([&](auto i) NIBBLE_INLINE { lanes[i] = Zero(); });
    int32_t k = 0;
    for (; k + kNormLanes <= x.columns; k += kNormLanes) {
      Unroll<kVecs>([&](auto i) NIBBLE_INLINE {
        const Vec v = Load(in + k + i * kLanes);
        lanes[i] = Fma(v, v, lanes[i]);
      });
    }
    Unroll<kVecs>([&](auto i) NIBBLE_INLINE {
      const int32_t left = x.columns - k - i * kLanes;
      if (left > 0) {
        const Vec v =
            left >= kLanes ? Load(in + k + i * kLanes) : LoadFirst(in + k + i * kLanes, left);
        lanes[i] = Fma(v, v, lanes[i]);
      }
    });
    const float sum = SumLanes(Add(Add(lanes[0], lanes[2]), Add(lanes[1], lanes[3])));
    const float mean = sum / static_cast<float>(x.columns);
    const Vec scale = Set(1.0F / __builtin_sqrtf(mean + epsilon));
    for (k = 0; k + kLanes <= x.columns; k += kLanes) {
      Store(to + k, Mul(Mul(Load(in + k), scale), Load(weight + k)));
    }
    if (const int32_t left = x.columns - k; left > 0) {
      StoreFirst(to + k, left,
                 Mul(Mul(LoadFirst(in + k, left), scale), LoadFirst(weight + k, left)));
    }
  }
}

void AddRows(float* x, const float* y, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(x + i, Add(Load(x + i), Load(y + i)));
  if (const int left = static_cast<int>(count - i); left > 0) {
    StoreFirst(x + i, left, Add(LoadFirst(x + i, left), LoadFirst(y + i, left)));
  }
}

NIBBLE_INLINE inline Vec Silu(Vec gate) {
  return Div(gate, Add(Set(1.0F), Exp(Sub(Set(-0.0F), gate))));
}

void SiluMul(const float* gate_up, int32_t tokens, int32_t columns, float* out) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float* gate = gate_up + t * 2 * columns;
    const float* up = gate + columns;
    float* to = out + t * columns;
    int32_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) {
      Store(to + i, Mul(Silu(Load(gate + i)), Load(up + i)));
    }
    if (const int32_t left = columns - i; left > 0) {
      StoreFirst(to + i, left, Mul(Silu(LoadFirst(gate + i, left)), LoadFirst(up + i, left)));
    }
  }
}

NIBBLE_INLINE inline void Rotate(float* low_at, float* high_at, const float* cos_at,
                                 const float* sin_at, int n) {
  const Vec low = n == kLanes ? Load(low_at) : LoadFirst(low_at, n);
  const Vec high = n == kLanes ? Load(high_at) : LoadFirst(high_at, n);
  const Vec cos = n == kLanes ? Load(cos_at) : LoadFirst(cos_at, n);
  const Vec sin = n == kLanes ? Load(sin_at) : LoadFirst(sin_at, n);
  const Vec new_low = Fma(low, cos, Sub(Set(-0.0F), Mul(high, sin)));
  const Vec new_high = Fma(high, cos, Mul(low, sin));
  if (n == kLanes) {
    Store(low_at, new_low);
    Store(high_at, new_high);
  } else {
    StoreFirst(low_at, n, new_low);
    StoreFirst(high_at, n, new_high);
  }
}

void Rope(float* x, int32_t heads, int32_t head_dim, const RopeArgs& rope, int32_t position) {
  const int32_t half = head_dim / 2;
  const float* cos = rope.cos + static_cast<int64_t>(position) * half;
  const float* sin = rope.sin + static_cast<int64_t>(position) * half;
  for (int32_t h = 0; h < heads; ++h) {
    float* head = x + static_cast<int64_t>(h) * head_dim;
    int32_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      Rotate(head + i, head + half + i, cos + i, sin + i, kLanes);
    }
    if (i < half) Rotate(head + i, head + half + i, cos + i, sin + i, half - i);
  }
}

// Sixteen (or the last n) elements of a head, rounded to binary16.
NIBBLE_INLINE inline void ToHalf(const float* from, int n, uint16_t* to) {
  StoreHalf(to, n == kLanes ? Load(from) : LoadFirst(from, n));
}

void WriteKv(const KvCache& cache, const float* k, const float* v, int32_t block, int32_t offset) {
  const int64_t head_dim = cache.head_dim;
  for (int64_t h = 0; h < cache.kv_heads; ++h) {
    const int64_t base = (block * static_cast<int64_t>(cache.kv_heads) + h) * head_dim * kKvBlock;
    const float* key = k + h * head_dim;
    const float* value = v + h * head_dim;
    if (cache.type == ElementType::kF32) {
      float* keys = static_cast<float*>(cache.keys) + base + offset;
      for (int64_t d = 0; d < head_dim; ++d) keys[d * kKvBlock] = key[d];
      __builtin_memcpy(static_cast<float*>(cache.values) + base + offset * head_dim, value,
                       static_cast<size_t>(head_dim) * sizeof(float));
      continue;
    }
    uint16_t* keys = static_cast<uint16_t*>(cache.keys) + base + offset;
    uint16_t* values = static_cast<uint16_t*>(cache.values) + base + offset * head_dim;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const int n = head_dim - d < kLanes ? static_cast<int>(head_dim - d) : kLanes;
      uint16_t half[kLanes];
      ToHalf(key + d, n, half);
      for (int i = 0; i < n; ++i) keys[(d + i) * kKvBlock] = half[i];
      ToHalf(value + d, n, half);
      __builtin_memcpy(values + d, half, static_cast<size_t>(n) * sizeof(uint16_t));
    }
  }
}

}  // namespace
}  // namespace nibble::cpu
