// Random operands for kernel tests, in logical and in packed form.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/pack.h"

namespace nibble::cpu {

// Fixed-seed generator; values do not depend on the standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
  }
  uint32_t Below(uint32_t limit) { return static_cast<uint32_t>(Next() % limit); }
  // In [-1, 1).
  float Uniform() { return static_cast<float>(static_cast<double>(Next() >> 11) * 0x1p-52 - 1.0); }

 private:
  uint64_t state_;
};

// 64-byte aligned, zeroed, with exactly `size` elements: a read past the end is seen by ASan.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0)
      : size_(size), data_(static_cast<T*>(std::aligned_alloc(64, Bytes(size)))) {
    std::memset(data_.get(), 0, Bytes(size));
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_.get()[i]; }
  const T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static size_t Bytes(int64_t size) {
    return (static_cast<size_t>(size) * sizeof(T) + 63) / 64 * 64;
  }
  int64_t size_;
  std::unique_ptr<T[], Free> data_;
};

inline Buffer<float> RandomFloats(int64_t count, Random& random, float scale = 1.0F) {
  Buffer<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = random.Uniform() * scale;
  return values;
}

struct W4Data {
  W4Data(int32_t rows, int32_t columns, int32_t group, ElementType scale_type, Random& random)
      : q(static_cast<int64_t>(rows) * columns),
        z(static_cast<int64_t>(rows) * (columns / group)),
        s(static_cast<int64_t>(rows) * (columns / group)),
        nibbles(layout::W4NibbleBytes(rows, columns)),
        scales(layout::GroupEntries(rows, columns, group) *
               (scale_type == ElementType::kF32 ? 2 : 1)),
        zeros(layout::GroupEntries(rows, columns, group)) {
    for (int64_t i = 0; i < q.size(); ++i) q[i] = static_cast<uint8_t>(random.Below(16));
    for (int64_t i = 0; i < z.size(); ++i) {
      z[i] = static_cast<uint8_t>(random.Below(16));
      s[i] = HalfToFloat(FloatToHalf(0.001F + 0.05F * (random.Uniform() + 1.0F)));
    }
    matrix = {.rows = rows,
              .columns = columns,
              .group = group,
              .nibbles = nibbles.data(),
              .scales = scales.data(),
              .scale_type = scale_type,
              .zeros = zeros.data()};
    Pack();
  }
  void Pack() {
    const int32_t groups = matrix.columns / matrix.group;
    PackNibbles(q.data(), matrix.rows, matrix.columns, nibbles.data());
    PackZeros(z.data(), matrix.rows, groups, zeros.data());
    PackScales(s.data(), matrix.rows, groups, matrix.scale_type, scales.data());
  }
  double Weight(int64_t row, int64_t k) const {
    const int64_t at = row * (matrix.columns / matrix.group) + k / matrix.group;
    return (static_cast<double>(q[row * matrix.columns + k]) - z[at]) * s[at];
  }

  Buffer<uint8_t> q, z;
  Buffer<float> s;
  Buffer<uint8_t> nibbles;
  Buffer<uint16_t> scales;
  Buffer<uint8_t> zeros;
  W4Matrix matrix;
};

struct Int8Data {
  Int8Data(int32_t rows, int32_t columns, Random& random)
      : w(RandomFloats(static_cast<int64_t>(rows) * columns, random)),
        values(layout::Int8Bytes(rows, columns)),
        scales(layout::GroupEntries(rows, columns, layout::kInt8Group)) {
    PackInt8(w.data(), rows, columns, values.data(), scales.data());
    matrix = {.rows = rows, .columns = columns, .values = values.data(), .scales = scales.data()};
  }

  Buffer<float> w;
  Buffer<uint8_t> values;
  Buffer<float> scales;
  Int8Matrix matrix;
};

struct DenseData {
  DenseData(int32_t rows, int32_t columns, ElementType type, Random& random)
      : w(RandomFloats(static_cast<int64_t>(rows) * columns, random)),
        values(layout::DenseEntries(rows, columns) * (type == ElementType::kF32 ? 2 : 1)) {
    PackDense(w.data(), rows, columns, type, values.data());
    matrix = {.rows = rows, .columns = columns, .values = values.data(), .type = type};
    for (int64_t i = 0; i < w.size() && type != ElementType::kF32; ++i) {
      w[i] = type == ElementType::kF16 ? HalfToFloat(FloatToHalf(w[i]))
                                       : BFloatToFloat(FloatToBFloat(w[i]));
    }
  }

  Buffer<float> w;
  Buffer<uint16_t> values;
  DenseMatrix matrix;
};

// Activations in every form that products take.
struct ActivationData {
  ActivationData(Buffer<float> x_values, int32_t tokens, int32_t columns, int32_t group,
                 int32_t terms = 1)
      : x(std::move(x_values)),
        values(x.size() * terms),
        scales(x.size() / group),
        group_sums(x.size() / group),
        sums(x.size() / group),
        tokens_(tokens),
        columns_(columns),
        group_(group),
        terms_(terms) {
    const Kernels& kernels = GetKernels(IsaLevel::kReference);
    kernels.quantize(Floats(), {group, terms, values.data(), scales.data(), sums.data()});
    kernels.group_sums(Floats(), group, group_sums.data());
  }
  // Tokens [first, first + count).
  FloatRows Floats(int32_t first, int32_t count) const {
    return {.tokens = count,
            .columns = columns_,
            .values = x.data() + static_cast<int64_t>(first) * columns_,
            .stride = columns_,
            .group_sums = group_sums.data() + static_cast<int64_t>(first) * (columns_ / group_)};
  }
  FloatRows Floats() const { return Floats(0, tokens_); }
  Int8Activations Ints(int32_t first, int32_t count) const {
    const int64_t group_at = static_cast<int64_t>(first) * (columns_ / group_);
    return {.tokens = count,
            .columns = columns_,
            .group = group_,
            .terms = terms_,
            .values = values.data() + static_cast<int64_t>(first) * terms_ * columns_,
            .scales = scales.data() + group_at,
            .sums = sums.data() + group_at};
  }

  // The quantized element, of one or two terms.
  int32_t Value(int64_t token, int64_t k) const {
    const int8_t* row = values.data() + token * terms_ * columns_;
    return terms_ == 1 ? row[k] : 256 * row[k] + row[columns_ + k];
  }

  Buffer<float> x;
  Buffer<int8_t> values;
  Buffer<float> scales, group_sums;
  Buffer<int32_t> sums;

 private:
  int32_t tokens_, columns_, group_, terms_;
};

// Every level that this machine can run, the reference first.
inline std::vector<IsaLevel> RunnableLevels() {
  std::vector<IsaLevel> levels;
  for (const IsaLevel level :
       {IsaLevel::kReference, IsaLevel::kAvx2, IsaLevel::kAvx512Vnni, IsaLevel::kAmx}) {
    if (IsaLevelSupported(level)) levels.push_back(level);
  }
  return levels;
}

inline uint32_t Bits(float x) {
  uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// Index of the first difference in bits, -1 if there is none. NaN equals NaN.
inline int64_t FirstDifference(std::span<const float> a, std::span<const float> b) {
  for (size_t i = 0; i < a.size(); ++i) {
    const bool both_nan = a[i] != a[i] && b[i] != b[i];
    if (!both_nan && Bits(a[i]) != Bits(b[i])) return static_cast<int64_t>(i);
  }
  return -1;
}

}  // namespace nibble::cpu
