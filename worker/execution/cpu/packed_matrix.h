// One matrix of a rank, packed for the kernels, and the form in which it wants its input.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernels.h"
#include "worker/execution/cpu/memory.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/logical_linear.h"
#include "worker/weights/rank_weights.h"
#include "worker/weights/shard.h"

namespace nibble::execution {

[[nodiscard]] cpu::ElementType ElementTypeOf(weights::FloatType type);

// Input rows as the kernels read them.
enum class InputKind : uint8_t {
  kFloat,      // fp32 rows
  kFloatSums,  // fp32 rows and a sum per group
  kInt8,       // int8 terms with a scale and a sum per group
};
struct InputForm {
  InputKind kind = InputKind::kFloat;
  int32_t group = 0;
  int32_t terms = 1;  // kInt8 only
};

// Input rows made ready in the form a matrix asks for. Borrowed.
struct MatrixInput {
  cpu::FloatRows floats;
  cpu::Int8Activations int8;
};

// Borrows its memory from an Arena. Immutable; thread-safe.
class PackedMatrix {
 public:
  PackedMatrix() = default;

  // Packs `linear`. `activation_terms`: int8 terms of a quantized matrix's input
  // (weights::ActivationTerms); 0 = fp32 input.
  [[nodiscard]] static PackedMatrix Pack(const weights::LogicalLinear& linear,
                                         int32_t activation_terms, Arena* arena);
  // Rows [rows.begin, rows.end) of a stored dense tensor [any, columns], converted in pieces:
  // to int8 with a scale per 32 columns, or kept in the stored type.
  [[nodiscard]] static PackedMatrix PackStoredRows(const weights::TensorView& tensor,
                                                   weights::Range rows, bool to_int8, Arena* arena);

  [[nodiscard]] int32_t rows() const { return rows_; }
  [[nodiscard]] int32_t columns() const { return columns_; }
  [[nodiscard]] int32_t row_blocks() const { return layout::RowBlocks(rows_); }
  [[nodiscard]] InputForm input_form() const { return input_form_; }

  // output[token * stride + row] for the row blocks [blocks.begin, blocks.end).
  void Multiply(const cpu::Kernels& kernels, const MatrixInput& input, float* output,
                int64_t stride, cpu::BlockRange blocks) const;

 private:
  weights::PackedKind kind_ = weights::PackedKind::kDense;
  int32_t rows_ = 0;
  int32_t columns_ = 0;
  InputForm input_form_;
  cpu::W4Matrix w4_;
  cpu::Int8Matrix int8_;
  cpu::DenseMatrix dense_;
  const float* bias_ = nullptr;
};

// A stored tensor's elements [begin, begin + count) widened to fp32.
void WidenElements(const weights::TensorView& tensor, int64_t begin, int64_t count, float* out);

}  // namespace nibble::execution
