#include "worker/execution/cpu/packed_matrix.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "kernels/cpu/pack.h"
#include "kernels/layout/cpu_w4.h"

namespace nibble::execution {
namespace {

using weights::FloatType;
using weights::LogicalLinear;
using weights::PackedKind;

int64_t ElementBytes(cpu::ElementType type) { return type == cpu::ElementType::kF32 ? 4 : 2; }

const float* CopyBias(const std::vector<float>& bias, Arena* arena) {
  if (bias.empty()) return nullptr;
  auto* copy = arena->Allocate<float>(static_cast<int64_t>(bias.size()));
  std::copy(bias.begin(), bias.end(), copy);
  return copy;
}

cpu::W4Matrix PackW4(const LogicalLinear& linear, Arena* arena) {
  CHECK(layout::GroupSupported(linear.group_size));
  const int32_t rows = linear.rows;
  const int32_t groups = linear.group_count();
  const int64_t entries = layout::GroupEntries(rows, linear.columns, linear.group_size);
  const auto scale_type =
      linear.stored_type == FloatType::kF16 ? cpu::ElementType::kF16 : cpu::ElementType::kF32;
  auto* nibbles = arena->Allocate<uint8_t>(layout::W4NibbleBytes(rows, linear.columns));
  auto* scales = arena->Allocate<uint8_t>(entries * ElementBytes(scale_type));
  auto* zeros = arena->Allocate<uint8_t>(entries);
  cpu::PackNibbles(linear.q.data(), rows, linear.columns, nibbles);
  cpu::PackScales(linear.scales.data(), rows, groups, scale_type, scales);
  cpu::PackZeros(linear.zeros.data(), rows, groups, zeros);
  return {.rows = rows,
          .columns = linear.columns,
          .group = linear.group_size,
          .nibbles = nibbles,
          .scales = scales,
          .scale_type = scale_type,
          .zeros = zeros};
}

cpu::ElementType StoredElementType(weights::TensorType type) {
  switch (type) {
    case weights::TensorType::kF16:
      return cpu::ElementType::kF16;
    case weights::TensorType::kBF16:
      return cpu::ElementType::kBF16;
    default:
      CHECK(type == weights::TensorType::kF32);
      return cpu::ElementType::kF32;
  }
}

}  // namespace

cpu::ElementType ElementTypeOf(FloatType type) {
  switch (type) {
    case FloatType::kF16:
      return cpu::ElementType::kF16;
    case FloatType::kBF16:
      return cpu::ElementType::kBF16;
    case FloatType::kF32:
      break;
  }
  return cpu::ElementType::kF32;
}

void WidenElements(const weights::TensorView& tensor, int64_t begin, int64_t count, float* out) {
  const cpu::ElementType type = StoredElementType(tensor.type);
  const std::byte* from = tensor.data.data() + begin * ElementBytes(type);
  if (type == cpu::ElementType::kF32) {
    std::memcpy(out, from, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits = 0;
    std::memcpy(&bits, from + i * 2, sizeof(bits));
    out[i] = type == cpu::ElementType::kF16 ? cpu::HalfToFloat(bits) : cpu::BFloatToFloat(bits);
  }
}

PackedMatrix PackedMatrix::Pack(const LogicalLinear& linear, int32_t activation_terms,
                                Arena* arena) {
  PackedMatrix matrix;
  matrix.rows_ = linear.rows;
  matrix.columns_ = linear.columns;
  matrix.bias_ = CopyBias(linear.bias, arena);
  if (linear.quantized()) {
    matrix.kind_ = PackedKind::kW4;
    matrix.w4_ = PackW4(linear, arena);
    matrix.input_form_ = {.kind = activation_terms > 0 ? InputKind::kInt8 : InputKind::kFloatSums,
                          .group = linear.group_size,
                          .terms = activation_terms};
    return matrix;
  }
  const cpu::ElementType type = ElementTypeOf(linear.stored_type);
  auto* values = arena->Allocate<uint8_t>(layout::DenseEntries(linear.rows, linear.columns) *
                                          ElementBytes(type));
  cpu::PackDense(linear.dense.data(), linear.rows, linear.columns, type, values);
  matrix.dense_ = {.rows = linear.rows, .columns = linear.columns, .values = values, .type = type};
  return matrix;
}

PackedMatrix PackedMatrix::PackStoredRows(const weights::TensorView& tensor, weights::Range rows,
                                          bool to_int8, Arena* arena) {
  constexpr int32_t kPiece = 64 * layout::kRowBlock;  // rows converted at once
  const auto columns = static_cast<int32_t>(tensor.shape.back());
  const cpu::ElementType type = StoredElementType(tensor.type);
  PackedMatrix matrix;
  matrix.rows_ = rows.count();
  matrix.columns_ = columns;
  uint8_t* values = nullptr;
  float* scales = nullptr;
  if (to_int8) {
    CHECK(columns % layout::kInt8Group == 0);
    values = arena->Allocate<uint8_t>(layout::Int8Bytes(matrix.rows_, columns));
    scales =
        arena->Allocate<float>(layout::GroupEntries(matrix.rows_, columns, layout::kInt8Group));
    matrix.kind_ = PackedKind::kInt8;
    matrix.int8_ = {.rows = matrix.rows_, .columns = columns, .values = values, .scales = scales};
    matrix.input_form_ = {.kind = InputKind::kInt8, .group = layout::kInt8Group};
  } else {
    values =
        arena->Allocate<uint8_t>(layout::DenseEntries(matrix.rows_, columns) * ElementBytes(type));
    matrix.dense_ = {.rows = matrix.rows_, .columns = columns, .values = values, .type = type};
  }
  std::vector<float> piece(static_cast<size_t>(kPiece) * static_cast<size_t>(columns));
  for (int32_t begin = 0; begin < matrix.rows_; begin += kPiece) {
    const int32_t count = std::min(kPiece, matrix.rows_ - begin);
    WidenElements(tensor, static_cast<int64_t>(rows.begin + begin) * columns,
                  static_cast<int64_t>(count) * columns, piece.data());
    if (to_int8) {
      cpu::PackInt8(piece.data(), count, columns, values + layout::Int8Address(begin, 0, columns),
                    scales + layout::GroupAddress(begin, 0, columns / layout::kInt8Group));
    } else {
      cpu::PackDense(piece.data(), count, columns, type,
                     values + layout::DenseAddress(begin, 0, columns) * ElementBytes(type));
    }
  }
  return matrix;
}

void PackedMatrix::Multiply(const cpu::Kernels& kernels, const MatrixInput& input, float* output,
                            int64_t stride, cpu::BlockRange blocks) const {
  if (blocks.begin >= blocks.end) return;
  const cpu::GemmOutput y{.values = output, .stride = stride, .bias = bias_};
  switch (kind_) {
    case PackedKind::kW4:
      if (input_form_.kind == InputKind::kInt8) {
        kernels.gemm_w4_int8(w4_, input.int8, y, blocks);
      } else {
        kernels.gemm_w4_float(w4_, input.floats, y, blocks);
      }
      return;
    case PackedKind::kInt8:
      kernels.gemm_int8(int8_, input.int8, y, blocks);
      return;
    case PackedKind::kDense:
      kernels.gemm_dense(dense_, input.floats, y, blocks);
      return;
  }
}

}  // namespace nibble::execution
