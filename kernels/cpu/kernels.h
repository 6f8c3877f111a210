// CPU kernels as a table of plain functions, one table per instruction-set level.
//
// Every level gives the same bits (the invariance law): one sum per row and group in rising k
// (int32 in the int8 kernels), then y = fma(s*sx, float(acc - z*X), y) by rising group; attention
// in tiles of 64 positions from position 0 with online softmax in that order; positions past the
// end are never used. So a result never depends on the level, the batch, the chunk or the number
// of threads. No function allocates, throws or keeps state; work is split among threads by the
// caller, on row blocks, tokens or heads.
#pragma once

#include <cstdint>
#include <string_view>

#include "kernels/layout/cpu_w4.h"

namespace nibble::cpu {

enum class IsaLevel : uint8_t { kReference, kAvx2, kAvx512Vnni, kAmx };
[[nodiscard]] std::string_view IsaLevelName(IsaLevel level);
[[nodiscard]] bool IsaLevelSupported(IsaLevel level);  // CPUID, XGETBV and the AMX permission
[[nodiscard]] IsaLevel BestIsaLevel();

enum class ElementType : uint8_t { kF16, kBF16, kF32 };

// Packed as kernels/layout/cpu_w4.h says. Borrowed pointers, 64-byte aligned.
struct W4Matrix {
  int32_t rows = 0;
  int32_t columns = 0;
  int32_t group = 0;                           // 32, 64 or 128
  const uint8_t* nibbles = nullptr;            // W4NibbleBytes
  const void* scales = nullptr;                // [row block][group][16] of scale_type
  ElementType scale_type = ElementType::kF16;  // kF16 or kF32
  const uint8_t* zeros = nullptr;              // [row block][group][16]
};
struct Int8Matrix {
  int32_t rows = 0;
  int32_t columns = 0;              // a multiple of kInt8Group
  const uint8_t* values = nullptr;  // w + 128
  const float* scales = nullptr;    // [row block][column / 32][16]
};
struct DenseMatrix {
  int32_t rows = 0;
  int32_t columns = 0;
  const void* values = nullptr;  // [row block][k][16] of type
  ElementType type = ElementType::kF16;
};

// Activations quantized per token and group, x = sx * xq, in one or two int8 terms, rounded to the
// nearest even:
//   one   xq = x * (127 / max|x|), in -127…127; its sum is X
//   two   xq = x * (32512 / max|x|) = 256 * high + low, high in -127…127, low in -128…127;
//         X holds the sum of the highs in its upper 16 bits, that of the lows in its lower 16
// A group of zeros (all below 2^-100) has sx = 0; one with NaN or infinity sx = NaN and xq = 0.
struct Int8Activations {
  int32_t tokens = 0;
  int32_t columns = 0;
  int32_t group = 0;
  int32_t terms = 1;
  const int8_t* values = nullptr;  // [tokens, terms, columns], the highs first
  const float* scales = nullptr;   // [tokens, columns / group]: sx
  const int32_t* sums = nullptr;   // [tokens, columns / group]: X
};
// The same to write to.
struct Int8Target {
  int32_t group = 0;
  int32_t terms = 1;
  int8_t* values = nullptr;
  float* scales = nullptr;
  int32_t* sums = nullptr;
};

// fp32 rows: [tokens, stride], the first `columns` of each used.
struct FloatRows {
  int32_t tokens = 0;
  int32_t columns = 0;
  const float* values = nullptr;
  int64_t stride = 0;
  const float* group_sums = nullptr;  // [tokens, columns / group]; GemmW4Float only
};

// Where products go: y[token * stride + row]. bias [rows] or nullptr is added last.
struct GemmOutput {
  float* values = nullptr;
  int64_t stride = 0;
  const float* bias = nullptr;
};

// Row blocks [begin, end) of 16 rows: a thread's share.
struct BlockRange {
  int32_t begin = 0;
  int32_t end = 0;
};

// The KV cache of one layer. Blocks of 16 positions:
//   keys   [block][kv_head][head_dim][16]   (16 positions side by side)
//   values [block][kv_head][16][head_dim]
struct KvCache {
  void* keys = nullptr;
  void* values = nullptr;
  ElementType type = ElementType::kF16;  // kF16 or kF32
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
};

struct RopeArgs {
  const float* cos = nullptr;  // [max_position, head_dim / 2], attention factor multiplied in
  const float* sin = nullptr;
};

// Rows of one sequence in a step.
struct AttentionArgs {
  const float* q = nullptr;  // [tokens, q_stride], heads side by side: already rotated
  int64_t q_stride = 0;
  float* out = nullptr;  // [tokens, out_stride]
  int64_t out_stride = 0;
  KvCache cache;
  const int32_t* block_table = nullptr;
  int32_t first_position = 0;  // of token 0; token t sees positions 0 … first_position + t
  int32_t window = 0;          // 0 = all; else only the last `window` of those
  int32_t heads = 0;           // query heads here; head h reads KV head h * kv_heads / heads
  float scale = 0;             // 1 / sqrt(head_dim)
};

struct Kernels {
  IsaLevel level;

  // x [tokens, columns] fp32 with row stride -> int8 groups, as in Int8Activations.
  void (*quantize)(const FloatRows& x, const Int8Target& to);
  // sums [tokens, columns / group], each sum in rising k.
  void (*group_sums)(const FloatRows& x, int32_t group, float* sums);

  void (*gemm_w4_int8)(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
                       BlockRange blocks);
  void (*gemm_w4_float)(const W4Matrix& w, const FloatRows& x, const GemmOutput& y,
                        BlockRange blocks);
  // x.group == kInt8Group, x.terms == 1.
  void (*gemm_int8)(const Int8Matrix& w, const Int8Activations& x, const GemmOutput& y,
                    BlockRange blocks);
  void (*gemm_dense)(const DenseMatrix& w, const FloatRows& x, const GemmOutput& y,
                     BlockRange blocks);

  // out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * weight, one token after the other.
  void (*rms_norm)(const FloatRows& x, const float* weight, float epsilon, float* out,
                   int64_t out_stride);
  // x += y, elementwise over [tokens, columns] (dense rows).
  void (*add)(float* x, const float* y, int64_t count);
  // gate_up [tokens, 2 * columns]: per token first all gates, then all ups -> silu(gate) * up.
  void (*silu_mul)(const float* gate_up, int32_t tokens, int32_t columns, float* out);
  // Rotates `heads` heads of one token in place ("rotate half").
  void (*rope)(float* x, int32_t heads, int32_t head_dim, const RopeArgs& rope, int32_t position);
  // Writes one token's K and V heads [kv_heads, head_dim] at its block and offset.
  void (*write_kv)(const KvCache& cache, const float* k, const float* v, int32_t block,
                   int32_t offset);
  // Query heads [head_begin, head_end) of tokens [token_begin, token_end).
  void (*attention)(const AttentionArgs& args, int32_t token_begin, int32_t token_end,
                    int32_t head_begin, int32_t head_end);
};

// REQUIRES: IsaLevelSupported(level).
[[nodiscard]] const Kernels& GetKernels(IsaLevel level);

}  // namespace nibble::cpu
