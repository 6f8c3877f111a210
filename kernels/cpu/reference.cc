// The plain form of every operation. Its order of operations is the definition that all other
// levels reproduce bit for bit.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/cpu/levels.h"
#include "kernels/cpu/numerics.h"
#include "kernels/cpu/pack.h"

namespace nibble::cpu {
namespace {

using layout::kInt8Group;
using layout::kRowBlock;

float LoadElement(const void* base, int64_t index, ElementType type) {
  switch (type) {
    case ElementType::kF32:
      return static_cast<const float*>(base)[index];
    case ElementType::kBF16:
      return BFloatToFloat(static_cast<const uint16_t*>(base)[index]);
    case ElementType::kF16:
      break;
  }
  return HalfToFloat(static_cast<const uint16_t*>(base)[index]);
}

// Returns the sum as Int8Activations holds it.
int32_t RoundGroup(const float* in, int32_t group, float inverse, int32_t terms, int8_t* out,
                   int32_t columns) {
  int32_t high_sum = 0;
  int32_t low_sum = 0;
  for (int32_t k = 0; k < group; ++k) {
    const int32_t q = inverse == 0 ? 0 : static_cast<int32_t>(std::nearbyint(in[k] * inverse));
    const int32_t high = terms == 1 ? q : (q + 128) >> 8;
    out[k] = static_cast<int8_t>(high);
    high_sum += high;
    if (terms == 1) continue;
    const int32_t low = q - 256 * high;
    out[columns + k] = static_cast<int8_t>(low);
    low_sum += low;
  }
  if (terms == 1) return high_sum;
  return static_cast<int32_t>((static_cast<uint32_t>(high_sum) << 16) |
                              (static_cast<uint32_t>(low_sum) & 0xffffU));
}

void Quantize(const FloatRows& x, const Int8Target& to) {
  const int32_t group = to.group;
  const int32_t groups = x.columns / group;
  const float limit = to.terms == 1 ? kQuantizeLimit : kQuantizeLimitOfTwo;
  for (int32_t t = 0; t < x.tokens; ++t) {
    for (int32_t g = 0; g < groups; ++g) {
      const float* in = x.values + t * x.stride + static_cast<int64_t>(g) * group;
      int8_t* out = to.values + static_cast<int64_t>(t) * to.terms * x.columns +
                    static_cast<int64_t>(g) * group;
      uint32_t largest_bits = 0;  // integer order of magnitudes: NaN > infinity > finite
      for (int32_t k = 0; k < group; ++k) {
        largest_bits = std::max(largest_bits, std::bit_cast<uint32_t>(in[k]) & 0x7fffffffU);
      }
      const float largest = std::bit_cast<float>(largest_bits);
      float scale = largest / limit;
      float inverse = limit / largest;
      if (largest_bits >= kInfinityBits) {
        scale = std::bit_cast<float>(kNanBits);
        inverse = 0;
      } else if (largest < kQuantizeFloor) {
        scale = 0;
        inverse = 0;
      }
      const int64_t at = static_cast<int64_t>(t) * groups + g;
      to.scales[at] = scale;
      to.sums[at] = RoundGroup(in, group, inverse, to.terms, out, x.columns);
    }
  }
}

// 256 * the sum of the highs + the sum of the lows.
int32_t SumOfTwo(int32_t sums) {
  return 256 * (sums >> 16) + static_cast<int16_t>(static_cast<uint16_t>(sums));
}

void GemmW4Int8(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
                BlockRange blocks) {
  const int32_t groups = w.columns / w.group;
  for (int32_t t = 0; t < x.tokens; ++t) {
    const int8_t* xq = x.values + static_cast<int64_t>(t) * x.terms * w.columns;
    const float* sx = x.scales + static_cast<int64_t>(t) * groups;
    const int32_t* sum_x = x.sums + static_cast<int64_t>(t) * groups;
    for (int32_t row = blocks.begin * kRowBlock; row < std::min(blocks.end * kRowBlock, w.rows);
         ++row) {
      float sum = 0;
      for (int32_t g = 0; g < groups; ++g) {
        int32_t acc = 0;
        for (int32_t k = g * w.group; k < (g + 1) * w.group; ++k) {
          const layout::NibbleAddress at = layout::W4Address(row, k, w.columns);
          const int32_t value = x.terms == 1 ? xq[k] : 256 * xq[k] + xq[w.columns + k];
          acc += ((w.nibbles[at.byte] >> at.shift) & 15) * value;
        }
        const int64_t entry = layout::GroupAddress(row, g, groups);
        acc -= w.zeros[entry] * (x.terms == 1 ? sum_x[g] : SumOfTwo(sum_x[g]));
        const float scale = LoadElement(w.scales, entry, w.scale_type) * sx[g];
        sum = std::fma(scale, static_cast<float>(acc), sum);
      }
      y.values[t * y.stride + row] = y.bias != nullptr ? sum + y.bias[row] : sum;
    }
  }
}

void GemmInt8(const Int8Matrix& w, const Int8Activations& x, const GemmOutput& y,
              BlockRange blocks) {
  const int32_t groups = w.columns / kInt8Group;
  for (int32_t t = 0; t < x.tokens; ++t) {
    const int8_t* xq = x.values + static_cast<int64_t>(t) * w.columns;
    const float* sx = x.scales + static_cast<int64_t>(t) * groups;
    for (int32_t row = blocks.begin * kRowBlock; row < std::min(blocks.end * kRowBlock, w.rows);
         ++row) {
      float sum = 0;
      for (int32_t g = 0; g < groups; ++g) {
        int32_t acc = 0;
        for (int32_t k = g * kInt8Group; k < (g + 1) * kInt8Group; ++k) {
          acc += (w.values[layout::Int8Address(row, k, w.columns)] - 128) * xq[k];
        }
        const float scale = w.scales[layout::GroupAddress(row, g, groups)] * sx[g];
        sum = std::fma(scale, static_cast<float>(acc), sum);
      }
      y.values[t * y.stride + row] = y.bias != nullptr ? sum + y.bias[row] : sum;
    }
  }
}

void GemmW4Float(const W4Matrix& w, const FloatRows& x, const GemmOutput& y, BlockRange blocks) {
  const int32_t groups = w.columns / w.group;
  for (int32_t t = 0; t < x.tokens; ++t) {
    const float* in = x.values + t * x.stride;
    const float* sum_x = x.group_sums + static_cast<int64_t>(t) * groups;
    for (int32_t row = blocks.begin * kRowBlock; row < std::min(blocks.end * kRowBlock, w.rows);
         ++row) {
      float sum = 0;
      for (int32_t g = 0; g < groups; ++g) {
        float acc = 0;
        for (int32_t k = g * w.group; k < (g + 1) * w.group; ++k) {
          const layout::NibbleAddress at = layout::W4Address(row, k, w.columns);
          acc = std::fma(static_cast<float>((w.nibbles[at.byte] >> at.shift) & 15), in[k], acc);
        }
        const int64_t entry = layout::GroupAddress(row, g, groups);
        acc = std::fma(-static_cast<float>(w.zeros[entry]), sum_x[g], acc);
        sum = std::fma(LoadElement(w.scales, entry, w.scale_type), acc, sum);
      }
      y.values[t * y.stride + row] = y.bias != nullptr ? sum + y.bias[row] : sum;
    }
  }
}

void GemmDense(const DenseMatrix& w, const FloatRows& x, const GemmOutput& y, BlockRange blocks) {
  for (int32_t t = 0; t < x.tokens; ++t) {
    const float* in = x.values + t * x.stride;
    for (int32_t row = blocks.begin * kRowBlock; row < std::min(blocks.end * kRowBlock, w.rows);
         ++row) {
      float sum = 0;
      for (int32_t k = 0; k < w.columns; ++k) {
        const int64_t at = layout::DenseAddress(row, k, w.columns);
        sum = std::fma(LoadElement(w.values, at, w.type), in[k], sum);
      }
      y.values[t * y.stride + row] = y.bias != nullptr ? sum + y.bias[row] : sum;
    }
  }
}

// Sums lanes [0, count) pairwise: lane i with lane i + count / 2, until one is left.
float SumLanes(float* lanes, int32_t count) {
  for (int32_t half = count / 2; half > 0; half /= 2) {
    for (int32_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Element k is summed in lane k % 64, lanes pairwise at the end.
void RmsNorm(const FloatRows& x, const float* weight, float epsilon, float* out,
             int64_t out_stride) {
  for (int32_t t = 0; t < x.tokens; ++t) {
    const float* in = x.values + t * x.stride;
    float lanes[kNormLanes] = {};
    for (int32_t k = 0; k < x.columns; ++k) {
      float& lane = lanes[k % kNormLanes];
      lane = std::fma(in[k], in[k], lane);
    }
    const float mean = SumLanes(lanes, kNormLanes) / static_cast<float>(x.columns);
    const float scale = 1.0F / std::sqrt(mean + epsilon);
    for (int32_t k = 0; k < x.columns; ++k) out[t * out_stride + k] = in[k] * scale * weight[k];
  }
}

void Add(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] += y[i];
}

float Exp(float x) {
  if (std::isnan(x)) return x;
  x = std::min(std::max(x, kExpLowest), kExpHighest);
  const float shifted = std::fma(x, kLog2E, kExpShift);
  const float n = shifted - kExpShift;
  float r = std::fma(-n, kLn2High, x);
  r = std::fma(-n, kLn2Low, r);
  float p = kExpTerms[0];
  for (int32_t i = 1; i < kExpTermCount; ++i) p = std::fma(p, r, kExpTerms[i]);
  return p * std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) << 23);
}

void SiluMul(const float* gate_up, int32_t tokens, int32_t columns, float* out) {
  for (int32_t t = 0; t < tokens; ++t) {
    const float* gate = gate_up + static_cast<int64_t>(t) * 2 * columns;
    const float* up = gate + columns;
    for (int32_t i = 0; i < columns; ++i) {
      out[static_cast<int64_t>(t) * columns + i] = gate[i] / (1.0F + Exp(-gate[i])) * up[i];
    }
  }
}

void Rope(float* x, int32_t heads, int32_t head_dim, const RopeArgs& rope, int32_t position) {
  const int32_t half = head_dim / 2;
  const float* cos = rope.cos + static_cast<int64_t>(position) * half;
  const float* sin = rope.sin + static_cast<int64_t>(position) * half;
  for (int32_t h = 0; h < heads; ++h) {
    float* low = x + static_cast<int64_t>(h) * head_dim;
    float* high = low + half;
    for (int32_t i = 0; i < half; ++i) {
      const float a = low[i];
      const float b = high[i];
      low[i] = std::fma(a, cos[i], -(b * sin[i]));
      high[i] = std::fma(b, cos[i], a * sin[i]);
    }
  }
}

// Index of the first element of a head in a block of the cache, keys and values alike.
int64_t HeadOffset(const KvCache& cache, int32_t block, int32_t head) {
  return (static_cast<int64_t>(block) * cache.kv_heads + head) * cache.head_dim * kKvBlock;
}

void WriteKv(const KvCache& cache, const float* k, const float* v, int32_t block, int32_t offset) {
  for (int32_t h = 0; h < cache.kv_heads; ++h) {
    const int64_t base = HeadOffset(cache, block, h);
    for (int32_t d = 0; d < cache.head_dim; ++d) {
      const int64_t key = base + d * kKvBlock + offset;
      const int64_t value = base + offset * cache.head_dim + d;
      const int64_t from = static_cast<int64_t>(h) * cache.head_dim + d;
      if (cache.type == ElementType::kF32) {
        static_cast<float*>(cache.keys)[key] = k[from];
        static_cast<float*>(cache.values)[value] = v[from];
      } else {
        static_cast<uint16_t*>(cache.keys)[key] = FloatToHalf(k[from]);
        static_cast<uint16_t*>(cache.values)[value] = FloatToHalf(v[from]);
      }
    }
  }
}

// One query head of one token. `out` is the accumulator.
struct AttentionRow {
  const float* q;
  float* out;
  int32_t kv_head;
  int32_t begin;  // visible positions [begin, end)
  int32_t end;
  float largest;
  float total;
};

// Visible positions [from, to) of the tile that starts at `tile`.
void AttendTile(const AttentionArgs& args, int32_t tile, int32_t from, int32_t to,
                AttentionRow& row) {
  const KvCache& cache = args.cache;
  float p[kAttentionTile] = {};
  float largest = row.largest;
  for (int32_t position = from; position < to; ++position) {
    const int64_t base = HeadOffset(cache, args.block_table[position / kKvBlock], row.kv_head);
    float dot = 0;
    for (int32_t d = 0; d < cache.head_dim; ++d) {
      const float key =
          LoadElement(cache.keys, base + d * kKvBlock + position % kKvBlock, cache.type);
      dot = std::fma(row.q[d], key, dot);
    }
    p[position - tile] = dot * args.scale;
    largest = std::max(largest, p[position - tile]);
  }
  float lanes[kAttentionTile] = {};
  for (int32_t position = from; position < to; ++position) {
    const int32_t i = position - tile;
    p[i] = Exp(p[i] - largest);
    lanes[i] = p[i];
  }
  const float correction = Exp(row.largest - largest);
  row.total = std::fma(row.total, correction, SumLanes(lanes, kAttentionTile));
  row.largest = largest;
  for (int32_t d = 0; d < cache.head_dim; ++d) {
    float sum = row.out[d] * correction;
    for (int32_t position = from; position < to; ++position) {
      const int64_t base = HeadOffset(cache, args.block_table[position / kKvBlock], row.kv_head);
      const int64_t at = base + static_cast<int64_t>(position % kKvBlock) * cache.head_dim + d;
      sum = std::fma(p[position - tile], LoadElement(cache.values, at, cache.type), sum);
    }
    row.out[d] = sum;
  }
}

void Attention(const AttentionArgs& args, int32_t token_begin, int32_t token_end,
               int32_t head_begin, int32_t head_end) {
  const int32_t head_dim = args.cache.head_dim;
  for (int32_t t = token_begin; t < token_end; ++t) {
    const int32_t end = args.first_position + t + 1;
    const int32_t begin = args.window > 0 ? std::max(0, end - args.window) : 0;
    for (int32_t h = head_begin; h < head_end; ++h) {
      AttentionRow row = {
          .q = args.q + t * args.q_stride + static_cast<int64_t>(h) * head_dim,
          .out = args.out + t * args.out_stride + static_cast<int64_t>(h) * head_dim,
          .kv_head = h * args.cache.kv_heads / args.heads,
          .begin = begin,
          .end = end,
          .largest = -std::numeric_limits<float>::infinity(),
          .total = 0};
      std::fill(row.out, row.out + head_dim, 0.0F);
      for (int32_t tile = begin / kAttentionTile * kAttentionTile; tile < end;
           tile += kAttentionTile) {
        AttendTile(args, tile, std::max(begin, tile), std::min(end, tile + kAttentionTile), row);
      }
      const float inverse = 1.0F / row.total;
      for (int32_t d = 0; d < head_dim; ++d) row.out[d] *= inverse;
    }
  }
}

}  // namespace

void GroupSums(const FloatRows& x, int32_t group, float* sums) {
  const int32_t groups = x.columns / group;
  for (int32_t t = 0; t < x.tokens; ++t) {
    for (int32_t g = 0; g < groups; ++g) {
      const float* in = x.values + t * x.stride + static_cast<int64_t>(g) * group;
      float sum = 0;
      for (int32_t k = 0; k < group; ++k) sum += in[k];
      sums[static_cast<int64_t>(t) * groups + g] = sum;
    }
  }
}

extern const Kernels kReferenceKernels = {
    .level = IsaLevel::kReference,
    .quantize = Quantize,
    .group_sums = GroupSums,
    .gemm_w4_int8 = GemmW4Int8,
    .gemm_w4_float = GemmW4Float,
    .gemm_int8 = GemmInt8,
    .gemm_dense = GemmDense,
    .rms_norm = RmsNorm,
    .add = Add,
    .silu_mul = SiluMul,
    .rope = Rope,
    .write_kv = WriteKv,
    .attention = Attention,
};

}  // namespace nibble::cpu
