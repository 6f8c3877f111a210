// The AVX-512 (VNNI) level: elementwise operations, attention and the table.
#include "kernels/cpu/vec_avx512.h"
//
#include "kernels/cpu/attention.h"
#include "kernels/cpu/avx512.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/levels.h"

namespace nibble::cpu {

extern const Kernels kAvx512Kernels = {
    .level = IsaLevel::kAvx512Vnni,
    .quantize = Quantize,
    .group_sums = GroupSums,
    .gemm_w4_int8 = GemmW4Int8Avx512,
    .gemm_w4_float = GemmW4FloatAvx512,
    .gemm_int8 = GemmInt8Avx512,
    .gemm_dense = GemmDenseAvx512,
    .rms_norm = RmsNorm,
    .add = AddRows,
    .silu_mul = SiluMul,
    .rope = Rope,
    .write_kv = WriteKv,
    .attention = Attention,
};

}  // namespace nibble::cpu
