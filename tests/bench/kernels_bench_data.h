// Operands of the kernel benchmarks.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/pack.h"

namespace nibble::cpu {

// 64-byte aligned memory, filled with bytes that do not matter.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : bytes_(static_cast<size_t>(count) * sizeof(T) + 64) {
    std::minstd_rand random(7);
    for (size_t i = 0; i < bytes_.size(); ++i) bytes_[i] = static_cast<uint8_t>(random() >> 8);
  }
  T* data() {
    const uintptr_t address = reinterpret_cast<uintptr_t>(bytes_.data());
    return reinterpret_cast<T*>((address + 63) / 64 * 64);
  }

 private:
  std::vector<uint8_t> bytes_;
};

inline Buffer<float> Floats(int64_t count, float scale = 1.0F) {
  Buffer<float> buffer(count);
  std::minstd_rand random(11);
  for (int64_t i = 0; i < count; ++i) {
    buffer.data()[i] = scale * (static_cast<float>(random()) / 1073741824.0F - 1.0F);
  }
  return buffer;
}

struct W4 {
  W4(int32_t rows, int32_t columns, int32_t group)
      : nibbles(layout::W4NibbleBytes(rows, columns)),
        scales(layout::GroupEntries(rows, columns, group)),
        zeros(layout::GroupEntries(rows, columns, group)) {
    const int64_t entries = layout::GroupEntries(rows, columns, group);
    for (int64_t i = 0; i < entries; ++i) {
      scales.data()[i] = FloatToHalf(0.01F);
      zeros.data()[i] = static_cast<uint8_t>(i % 16);
    }
    matrix = {.rows = rows,
              .columns = columns,
              .group = group,
              .nibbles = nibbles.data(),
              .scales = scales.data(),
              .scale_type = ElementType::kF16,
              .zeros = zeros.data()};
  }
  double bytes() const {
    return static_cast<double>(layout::W4NibbleBytes(matrix.rows, matrix.columns)) +
           3.0 *
               static_cast<double>(layout::GroupEntries(matrix.rows, matrix.columns, matrix.group));
  }
  Buffer<uint8_t> nibbles;
  Buffer<uint16_t> scales;
  Buffer<uint8_t> zeros;
  W4Matrix matrix;
};

// Activations of `tokens` rows, as floats and quantized.
struct Activations {
  Activations(int32_t tokens, int32_t columns, int32_t group, int32_t terms = 1)
      : x(Floats(static_cast<int64_t>(tokens) * columns)),
        values(static_cast<int64_t>(tokens) * terms * columns),
        scales(static_cast<int64_t>(tokens) * columns / group),
        group_sums(static_cast<int64_t>(tokens) * columns / group),
        sums(static_cast<int64_t>(tokens) * columns / group) {
    floats = {.tokens = tokens,
              .columns = columns,
              .values = x.data(),
              .stride = columns,
              .group_sums = group_sums.data()};
    const Kernels& kernels = GetKernels(BestIsaLevel());
    kernels.quantize(floats, {group, terms, values.data(), scales.data(), sums.data()});
    kernels.group_sums(floats, group, group_sums.data());
    ints = {.tokens = tokens,
            .columns = columns,
            .group = group,
            .terms = terms,
            .values = values.data(),
            .scales = scales.data(),
            .sums = sums.data()};
  }
  Buffer<float> x;
  Buffer<int8_t> values;
  Buffer<float> scales, group_sums;
  Buffer<int32_t> sums;
  FloatRows floats;
  Int8Activations ints;
};

}  // namespace nibble::cpu
