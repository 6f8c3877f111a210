// The products of the AVX2 level that have files of their own.
#pragma once

#include "kernels/cpu/kernels.h"

namespace nibble::cpu {

void GemmW4Int8Avx2(const W4Matrix& w, const Int8Activations& x, const GemmOutput& y,
                    BlockRange blocks);
void GemmInt8Avx2(const Int8Matrix& w, const Int8Activations& x, const GemmOutput& y,
                  BlockRange blocks);
void GemmW4FloatAvx2(const W4Matrix& w, const FloatRows& x, const GemmOutput& y, BlockRange blocks);
void GemmDenseAvx2(const DenseMatrix& w, const FloatRows& x, const GemmOutput& y,
                   BlockRange blocks);

}  // namespace nibble::cpu
