#include "worker/execution/cpu/matrix_input.h"

namespace nibble::execution {

MatrixInput InputConverter::Convert(int32_t thread, InputForm form, cpu::FloatRows rows,
                                    Rows state) const {
  const Buffers::Converted& target = Target(thread, rows.tokens);
  const cpu::BlockRange mine = TokensOf(thread, rows.tokens);
  cpu::FloatRows part = rows;
  part.tokens = mine.end - mine.begin;
  part.values = rows.values + mine.begin * rows.stride;
  MatrixInput input{.floats = rows, .int8 = {}};
  const int64_t groups = form.group > 0 ? rows.columns / form.group : 0;
  switch (form.kind) {
    case InputKind::kFloat:
      if (state == Rows::kReady) return input;
      break;
    case InputKind::kFloatSums:
      kernels_->group_sums(part, form.group, target.scales + mine.begin * groups);
      input.floats.group_sums = target.scales;
      break;
    case InputKind::kInt8:
      kernels_->quantize(part, {.group = form.group,
                                .terms = form.terms,
                                .values = target.values + static_cast<int64_t>(mine.begin) *
                                                              form.terms * rows.columns,
                                .scales = target.scales + mine.begin * groups,
                                .sums = target.sums + mine.begin * groups});
      input.int8 = {.tokens = rows.tokens,
                    .columns = rows.columns,
                    .group = form.group,
                    .terms = form.terms,
                    .values = target.values,
                    .scales = target.scales,
                    .sums = target.sums};
      break;
  }
  if (rows.tokens > kPrivateTokens) team_->Barrier(thread);
  return input;
}

}  // namespace nibble::execution
