// Float products of the AVX2 level.
#include "kernels/cpu/vec_avx2.h"
//
#include "kernels/cpu/avx2.h"
#include "kernels/cpu/float_products.h"

namespace nibble::cpu {

void GemmW4FloatAvx2(const W4Matrix& w, const FloatRows& x, const GemmOutput& y,
                     BlockRange blocks) {
  MultiplyW4Float(w, x, y, blocks);
}

void GemmDenseAvx2(const DenseMatrix& w, const FloatRows& x, const GemmOutput& y,
                   BlockRange blocks) {
  MultiplyDense(w, x, y, blocks);
}

}  // namespace nibble::cpu
