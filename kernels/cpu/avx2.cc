// The AVX2 level: elementwise operations, attention and the table.
#include "kernels/cpu/vec_avx2.h"
//
#include "kernels/cpu/attention.h"
#include "kernels/cpu/avx2.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/levels.h"

namespace nibble::cpu {

extern const Kernels kAvx2Kernels = {
    .level = IsaLevel::kAvx2,
    .quantize = Quantize,
    .group_sums = GroupSums,
    .gemm_w4_int8 = GemmW4Int8Avx2,
    .gemm_w4_float = GemmW4FloatAvx2,
    .gemm_int8 = GemmInt8Avx2,
    .gemm_dense = GemmDenseAvx2,
    .rms_norm = RmsNorm,
    .add = AddRows,
    .silu_mul = SiluMul,
    .rope = Rope,
    .write_kv = WriteKv,
    .attention = Attention,
};

}  // namespace nibble::cpu
