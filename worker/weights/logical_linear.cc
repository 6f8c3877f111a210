#include "worker/weights/logical_linear.h"

#include <algorithm>

#include "base/check.h"
#include "base/status.h"
#include "worker/model/message.h"

namespace nibble::weights {
namespace {

using model::Message;

template <typename T>
std::vector<T> RowsOf(const std::vector<T>& values, int64_t per_row, int32_t begin, int32_t end) {
  if (values.empty()) return {};
  return {values.begin() + begin * per_row, values.begin() + end * per_row};
}

// Columns [begin, end) of a matrix of `columns` columns.
template <typename T>
std::vector<T> ColumnsOf(const std::vector<T>& values, int64_t columns, int64_t begin,
                         int64_t end) {
  std::vector<T> part;
  if (values.empty()) return part;
  const int64_t rows = static_cast<int64_t>(values.size()) / columns;
  part.reserve(rows * (end - begin));
  for (int64_t row = 0; row < rows; ++row) {
    const auto line = values.begin() + row * columns;
    part.insert(part.end(), line + begin, line + end);
  }
  return part;
}

template <typename T>
std::vector<T> Repeated(const std::vector<T>& values, int32_t times) {
  std::vector<T> repeated;
  repeated.reserve(values.size() * times);
  for (const T value : values) repeated.insert(repeated.end(), times, value);
  return repeated;
}

template <typename T>
void Append(const std::vector<T>& from, std::vector<T>* to) {
  to->insert(to->end(), from.begin(), from.end());
}

LogicalLinear Header(const LogicalLinear& linear) {
  LogicalLinear copy;
  copy.name = linear.name;
  copy.rows = linear.rows;
  copy.columns = linear.columns;
  copy.group_size = linear.group_size;
  copy.stored_type = linear.stored_type;
  return copy;
}

}  // namespace

int32_t PackedGroup(int32_t group_size, int32_t begin, int32_t end) {
  const auto divides = [&](int32_t unit) {
    return group_size % unit == 0 && begin % unit == 0 && end % unit == 0;
  };
  for (const int32_t unit : {128, 64, 32}) {
    if (divides(unit)) return unit;
  }
  return 0;
}

LogicalLinear SliceRows(const LogicalLinear& linear, int32_t begin, int32_t end) {
  CHECK(begin >= 0 && begin <= end && end <= linear.rows);
  LogicalLinear slice = Header(linear);
  slice.rows = end - begin;
  slice.q = RowsOf(linear.q, linear.columns, begin, end);
  slice.zeros = RowsOf(linear.zeros, linear.group_count(), begin, end);
  slice.scales = RowsOf(linear.scales, linear.group_count(), begin, end);
  slice.dense = RowsOf(linear.dense, linear.columns, begin, end);
  slice.bias = RowsOf(linear.bias, 1, begin, end);
  return slice;
}

absl::StatusOr<LogicalLinear> SliceColumns(const LogicalLinear& linear, int32_t begin,
                                           int32_t end) {
  CHECK(begin >= 0 && begin <= end && end <= linear.columns);
  if (linear.quantized() && (begin % linear.group_size != 0 || end % linear.group_size != 0)) {
    const int32_t group = PackedGroup(linear.group_size, begin, end);
    if (group == 0) {
      return absl::InvalidArgumentError(Message(
          linear.name, ": columns ", begin, " … ", end, " cut groups of ", linear.group_size,
          "; allowed: cuts at multiples of 32 within groups that 32 divides"));
    }
    return SliceColumns(Regroup(linear, group), begin, end);
  }
  LogicalLinear slice = Header(linear);
  slice.columns = end - begin;
  slice.q = ColumnsOf(linear.q, linear.columns, begin, end);
  slice.dense = ColumnsOf(linear.dense, linear.columns, begin, end);
  if (linear.quantized()) {
    const int32_t group = linear.group_size;
    const int32_t groups = linear.group_count();
    slice.zeros = ColumnsOf(linear.zeros, groups, begin / group, end / group);
    slice.scales = ColumnsOf(linear.scales, groups, begin / group, end / group);
  }
  if (begin == 0) slice.bias = linear.bias;
  return slice;
}

LogicalLinear Regroup(LogicalLinear linear, int32_t group_size) {
  CHECK(linear.quantized() && group_size > 0 && linear.group_size % group_size == 0);
  if (group_size == linear.group_size) return linear;
  const int32_t times = linear.group_size / group_size;
  linear.group_size = group_size;
  linear.zeros = Repeated(linear.zeros, times);
  linear.scales = Repeated(linear.scales, times);
  return linear;
}

absl::StatusOr<LogicalLinear> ConcatenateRows(const std::vector<LogicalLinear>& parts) {
  CHECK(!parts.empty());
  LogicalLinear result = Header(parts.front());
  result.rows = 0;
  bool any_bias = false;
  for (const LogicalLinear& part : parts) {
    if (part.columns != result.columns || part.group_size != result.group_size) {
      return absl::InvalidArgumentError(Message(
          part.name, " has ", part.columns, " columns in groups of ", part.group_size, "; ",
          parts.front().name, " has ", result.columns, " in groups of ", result.group_size));
    }
    if (part.stored_type != result.stored_type) result.stored_type = FloatType::kF32;
    any_bias = any_bias || !part.bias.empty();
  }
  for (const LogicalLinear& part : parts) {
    result.rows += part.rows;
    Append(part.q, &result.q);
    Append(part.zeros, &result.zeros);
    Append(part.scales, &result.scales);
    Append(part.dense, &result.dense);
    if (any_bias && part.bias.empty()) {
      result.bias.resize(result.bias.size() + part.rows, 0.0f);
    }
    Append(part.bias, &result.bias);
  }
  return result;
}

std::vector<float> Dequantize(const LogicalLinear& linear) {
  if (!linear.quantized()) return linear.dense;
  std::vector<float> values(linear.q.size());
  const int64_t groups = linear.group_count();
  for (int64_t row = 0; row < linear.rows; ++row) {
    for (int64_t column = 0; column < linear.columns; ++column) {
      const int64_t group = row * groups + column / linear.group_size;
      const int64_t i = row * linear.columns + column;
      values[i] = static_cast<float>(linear.q[i] - linear.zeros[group]) * linear.scales[group];
    }
  }
  return values;
}

}  // namespace nibble::weights
