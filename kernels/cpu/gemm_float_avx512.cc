// Float products of the AVX-512 level.
#include "kernels/cpu/vec_avx512.h"
//
#include "kernels/cpu/avx512.h"
#include "kernels/cpu/float_products.h"

namespace nibble::cpu {

void GemmW4FloatAvx512(const W4Matrix& w, const FloatRows& x, const GemmOutput& y,
                       BlockRange blocks) {
  MultiplyW4Float(w, x, y, blocks);
}

void GemmDenseAvx512(const DenseMatrix& w, const FloatRows& x, const GemmOutput& y,
                     BlockRange blocks) {
  MultiplyDense(w, x, y, blocks);
}

}  // namespace nibble::cpu
