// Checks products whose blocks meet, and what they leave for the product behind the next norm.
#pragma once

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/cuda/w4_order.h"
#include "kernels/cuda/w4_wgmma.h"
#include "tests/gpu/comparison.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/fixed_numbers.h"
#include "tests/gpu/w4_logical.cuh"

namespace nibble::cuda {

// x as the tensor cores take it; zeros where there is none.
inline std::vector<Real16> InOrder(const std::vector<Real16>& x, int tokens, int columns,
                                   int group) {
  std::vector<Real16> ordered(layout::GpuOrderedCount(tokens, columns), ToReal(0));
  const int ordered_tokens = layout::GpuOrderedTokens(tokens);
  for (int t = 0; t < tokens; ++t) {
    for (int k = 0; k < columns; ++k) {
      ordered[layout::GpuOrderedIndex(t, k, group == 0 ? 128 : group, ordered_tokens)] =
          x[static_cast<size_t>(t) * columns + k];
    }
  }
  return ordered;
}

// A product into the residual stream, and one behind the norm that follows.
struct MeetingCase {
  int hidden, columns, group, tokens;
  int next_rows, next_group;
  bool fixed;  // the second takes fixed point
};

class MeetingCheck {
 public:
  MeetingCheck(const MeetingCase& c, int multiprocessors, cudaStream_t stream)
      : c_(c),
        multiprocessors_(multiprocessors),
        stream_(stream),
        slabs_(layout::GpuSlabs(c.hidden)),
        ordered_tokens_(layout::GpuOrderedTokens(c.tokens)),
        old_(Normal(static_cast<size_t>(c.tokens) * c.hidden, 3)),
        norm_weight_(NormalReals(c.hidden, 1)),
        bias_(NormalReals(c.hidden, 0.5f)),
        x_(NormalReals(static_cast<size_t>(c.tokens) * c.columns, 1)),
        scale_(c.tokens),
        left_(layout::GpuOrderedCount(c.tokens, c.hidden)),
        scales_(layout::GpuFixedScaleCount(c.tokens, c.hidden)),
        square_sums_(static_cast<size_t>(c.tokens) * slabs_) {
    for (int t = 0; t < c.tokens; ++t) scale_[t] = 0.5f + 0.25f * static_cast<float>(t % 7);
  }

  bool Run() {
    bool ok = true;
    std::vector<float> first;
    for (const bool dependent : {false, true}) {
      const std::vector<float> residual = Meet(dependent, &ok);
      if (!dependent) first = residual;
      ok = ok && std::memcmp(first.data(), residual.data(), first.size() * sizeof(float)) == 0;
      if (!ok) std::printf("FAIL %s\n", Name().c_str());
    }
    return ok;
  }

 private:
  [[nodiscard]] std::string Name() const {
    return "meeting of " + std::to_string(c_.hidden) + " x " + std::to_string(c_.columns) +
           " group " + std::to_string(c_.group) + " tokens " + std::to_string(c_.tokens) +
           (c_.fixed ? " fixed" : " ordered");
  }

  std::vector<float> Meet(bool dependent, bool* ok) {
    const RandomMatrix matrix(c_.hidden, c_.columns, c_.group, false);
    const DeviceArray<Real16> plain(x_), ordered(InOrder(x_, c_.tokens, c_.columns, c_.group));
    const DeviceArray<Real16> device_bias(bias_), weight(norm_weight_);
    const DeviceArray<float> scale(scale_);
    DeviceArray<float> residual(old_);
    const W4BatchParams params{.slabs = matrix.slabs(),
                               .rows = c_.hidden,
                               .columns = c_.columns,
                               .group = c_.group,
                               .tokens = c_.tokens,
                               .output = DecodeOutput::kAddResidual,
                               .residual_out = residual.get(),
                               .bias = device_bias.get()};
    const size_t words = old_.size() * W4WgmmaParts(params, multiprocessors_);
    DeviceArray<float> meeting(words);  // all bits are set
    left_.Set(std::vector<Real16>(layout::GpuOrderedCount(c_.tokens, c_.hidden), ToReal(0)));
    scales_.Set(std::vector<float>(layout::GpuFixedScaleCount(c_.tokens, c_.hidden), NAN));
    square_sums_.Set(std::vector<float>(static_cast<size_t>(c_.tokens) * slabs_, NAN));
    CUDA_OK(W4Wgmma(params,
                    {.ordered = ordered.get(),
                     .next_group = c_.next_group,
                     .next_scales = c_.fixed ? scales_.get() : nullptr,
                     .next = {.x = left_.get(),
                              .norm_weight = weight.get(),
                              .scale = scale.get(),
                              .square_sums = square_sums_.get()},
                     .meeting = meeting.get()},
                    multiprocessors_, {.stream = stream_, .dependent = dependent}));
    CUDA_OK(cudaDeviceSynchronize());
    const std::vector<float> result = residual.Get();
    std::vector<double> want = matrix.Product(plain.get(), c_.tokens);
    for (size_t i = 0; i < want.size(); ++i) want[i] += old_[i] + Double(bias_[i % c_.hidden]);
    *ok = Report(Name(), want, Doubles(result), 1e-3) && *ok;
    for (const float word : meeting.Get()) {
      constexpr uint32_t kAllSet = 0xffffffffu;
      *ok = std::memcmp(&word, &kAllSet, sizeof(word)) == 0 && *ok;
    }
    *ok = CheckLeft(result) && CheckNext(result, scale.get(), dependent) && *ok;
    return result;
  }

  static std::vector<double> Doubles(const std::vector<float>& values) {
    return {values.begin(), values.end()};
  }

  // Sums of squares, and the input, from what the residual stream has become.
  bool CheckLeft(const std::vector<float>& residual) const {
    std::vector<double> squares(static_cast<size_t>(c_.tokens) * slabs_, 0.0), want, got;
    std::vector<Real16> x;
    for (size_t i = 0; i < residual.size(); ++i) {
      const int token = static_cast<int>(i) / c_.hidden, k = static_cast<int>(i) % c_.hidden;
      squares[token * slabs_ + k / 128] += static_cast<double>(residual[i]) * residual[i];
      want.push_back(residual[i] * Double(norm_weight_[k]) * scale_[token] * kNormedInputFactor);
      x.push_back(ToReal(static_cast<float>(want.back())));
    }
    const bool same = Report("  its sums of squares", squares, Doubles(square_sums_.Get()), 1e-5);
    if (c_.fixed) return same && CheckFixed(want);
    want.clear();
    for (const Real16 value : InOrder(x, c_.tokens, c_.hidden, c_.next_group)) {
      want.push_back(Double(value));
    }
    for (const Real16 value : left_.Get()) got.push_back(Double(value));
    return Report("  the input it leaves", want, got, 1e-3) && same;
  }

  bool CheckFixed(const std::vector<double>& want) const {
    const FixedNumbers numbers(left_.Get(), scales_.Get(), c_.tokens, c_.hidden);
    return Report("  the input it leaves", want, numbers.values, 5e-5) &&
           Report("  its sums", numbers.sums_of_values, numbers.sums, 1e-5);
  }

  // The product behind the norm, whole and in parts.
  bool CheckNext(const std::vector<float>& residual, const float* scale, bool dependent) const {
    const RandomMatrix matrix(c_.next_rows, c_.hidden, c_.next_group, false);
    std::vector<Real16> normed;
    std::vector<double> inverses;
    for (int t = 0; t < c_.tokens; ++t) {
      const float* row = residual.data() + static_cast<size_t>(t) * c_.hidden;
      double squares = 0;
      for (int k = 0; k < c_.hidden; ++k) squares += static_cast<double>(row[k]) * row[k];
      inverses.push_back(1 / std::sqrt(squares / c_.hidden + 1e-5));
      for (int k = 0; k < c_.hidden; ++k) {
        normed.push_back(
            ToReal(static_cast<float>(row[k] * inverses.back() * Double(norm_weight_[k]))));
      }
    }
    const DeviceArray<Real16> plain(normed);
    const std::vector<double> want = matrix.Product(plain.get(), c_.tokens);
    DeviceArray<float> y(std::vector<float>(want.size(), NAN));
    DeviceArray<float> inverse_rms(std::vector<float>(c_.tokens, NAN));
    const W4BatchParams params{.slabs = matrix.slabs(),
                               .rows = c_.next_rows,
                               .columns = c_.hidden,
                               .group = c_.next_group,
                               .tokens = c_.tokens,
                               .output = DecodeOutput::kFloat,
                               .y_float = y.get()};
    WgmmaInput input{.ordered = left_.get(),
                     .fixed_scales = c_.fixed ? scales_.get() : nullptr,
                     .normed = {.scale = scale,
                                .square_sums = square_sums_.get(),
                                .parts = slabs_,
                                .epsilon = 1e-5f,
                                .inverse_rms_out = inverse_rms.get()}};
    CUDA_OK(W4Wgmma(params, input, multiprocessors_, {.stream = stream_, .dependent = dependent}));
    const int count = W4WgmmaParts(params, multiprocessors_);
    DeviceArray<float> parts(std::vector<float>(want.size() * count, NAN));
    input.parts = parts.get();
    CUDA_OK(W4Wgmma(params, input, multiprocessors_, {.stream = stream_, .dependent = dependent}));
    CUDA_OK(cudaDeviceSynchronize());
    std::vector<double> sums(want.size(), 0.0);
    const std::vector<float> left = parts.Get();
    for (size_t i = 0; i < left.size(); ++i) sums[i % sums.size()] += left[i];
    const bool right = Report("  the product behind it", want, Doubles(y.Get()), 1e-3);
    return Report("  the same in parts", want, sums, 1e-3) && right &&
           Report("  inverse rms", inverses, Doubles(inverse_rms.Get()), 1e-5) &&
           (!c_.fixed || c_.next_rows < 256 * 67 || CheckSilu(plain.get(), input));
  }

  // SiLU into fixed point, and a product that takes it and meets.
  bool CheckSilu(const Real16* normed, WgmmaInput input) const {
    const int ffn = c_.next_rows / 2;
    const RandomMatrix gate_up(c_.next_rows, c_.hidden, 128, true);
    DeviceArray<Real16> y(layout::GpuOrderedCount(c_.tokens, ffn));
    DeviceArray<float> y_scales(layout::GpuFixedScaleCount(c_.tokens, ffn));
    input.parts = nullptr;
    input.next_ordered = y.get();
    input.next_scales = y_scales.get();
    CUDA_OK(W4Wgmma({.slabs = gate_up.slabs(),
                     .rows = c_.next_rows,
                     .columns = c_.hidden,
                     .group = 128,
                     .tokens = c_.tokens,
                     .output = DecodeOutput::kSiluMul},
                    input, multiprocessors_, {.stream = stream_}));
    CUDA_OK(cudaDeviceSynchronize());
    const std::vector<double> plain = gate_up.Product(normed, c_.tokens);
    std::vector<double> want;
    for (int t = 0; t < c_.tokens; ++t) {
      const double* gates = plain.data() + static_cast<size_t>(t) * c_.next_rows;
      for (int i = 0; i < ffn; ++i) {
        want.push_back(gates[i] / (1 + std::exp(-gates[i])) * gates[ffn + i]);
      }
    }
    const FixedNumbers numbers(y.Get(), y_scales.Get(), c_.tokens, ffn);
    return Report("  SiLU in fixed point", want, numbers.values, 1e-3) &&
           Report("  its sums", numbers.sums_of_values, numbers.sums, 1e-5) &&
           CheckMeetingOfFixed(y.get(), y_scales.get(), numbers.values);
  }

  bool CheckMeetingOfFixed(const Real16* x, const float* x_scales,
                           const std::vector<double>& values) const {
    const int ffn = c_.next_rows / 2;
    const RandomMatrix down(c_.hidden, ffn, 128, false);
    std::vector<Real16> halves;
    for (const double value : values) halves.push_back(ToReal(static_cast<float>(value)));
    const DeviceArray<Real16> plain(halves), weight(norm_weight_);
    const DeviceArray<float> scale(scale_);
    DeviceArray<float> residual(old_), squares(static_cast<size_t>(c_.tokens) * slabs_);
    DeviceArray<float> scales(layout::GpuFixedScaleCount(c_.tokens, c_.hidden));
    DeviceArray<Real16> next(layout::GpuOrderedCount(c_.tokens, c_.hidden));
    const W4BatchParams params{.slabs = down.slabs(),
                               .rows = c_.hidden,
                               .columns = ffn,
                               .group = 128,
                               .tokens = c_.tokens,
                               .output = DecodeOutput::kAddResidual,
                               .residual_out = residual.get()};
    // All bits are set at first.
    DeviceArray<float> meeting(old_.size() * W4WgmmaParts(params, multiprocessors_));
    CUDA_OK(W4Wgmma(params,
                    {.ordered = x,
                     .fixed_scales = x_scales,
                     .next_scales = scales.get(),
                     .next = {.x = next.get(),
                              .norm_weight = weight.get(),
                              .scale = scale.get(),
                              .square_sums = squares.get()},
                     .meeting = meeting.get()},
                    multiprocessors_, {.stream = stream_}));
    CUDA_OK(cudaDeviceSynchronize());
    std::vector<double> want = down.Product(plain.get(), c_.tokens);
    for (size_t i = 0; i < want.size(); ++i) want[i] += old_[i];
    return Report("  the product of it", want, Doubles(residual.Get()), 1e-3);
  }

  const MeetingCase c_;
  const int multiprocessors_;
  const cudaStream_t stream_;
  const int slabs_, ordered_tokens_;
  const std::vector<float> old_;
  const std::vector<Real16> norm_weight_, bias_, x_;
  std::vector<float> scale_;
  DeviceArray<Real16> left_;
  DeviceArray<float> scales_, square_sums_;
};

// What the embedding leaves for the first norm's product.
inline bool CheckFixedEmbed(int tokens, int hidden, cudaStream_t stream) {
  constexpr int kVocab = 50;
  const std::vector<Real16> table = NormalReals(static_cast<size_t>(kVocab) * hidden, 0.02f);
  const std::vector<Real16> weight = NormalReals(hidden, 1);
  std::vector<int32_t> ids;
  for (int t = 0; t < tokens; ++t) ids.push_back(t % 3 == 1 ? -1 - t : t * 5 % kVocab);
  std::vector<int32_t> last(tokens);  // of slots
  for (int t = 0; t < tokens; ++t) last[t] = (t * 7 + 1) % kVocab;
  const DeviceArray<Real16> device_table(table), device_weight(weight);
  const DeviceArray<int32_t> device_ids(ids), device_last(last);
  const int slabs = layout::GpuSlabs(hidden);
  DeviceArray<float> residual(static_cast<size_t>(tokens) * hidden), scale(tokens);
  DeviceArray<float> squares(static_cast<size_t>(tokens) * slabs);
  DeviceArray<float> scales(layout::GpuFixedScaleCount(tokens, hidden));
  DeviceArray<Real16> x(layout::GpuOrderedCount(tokens, hidden));
  const EmbedParams embed{
      .table = device_table.get(),
      .token_ids = device_ids.get(),
      .last_tokens = device_last.get(),
      .tokens = tokens,
      .hidden = hidden,
      .residual = residual.get(),
      .next = {.x = x.get(), .norm_weight = device_weight.get(), .square_sums = squares.get()},
      .scale_out = scale.get()};
  CUDA_OK(FixedEmbed({.embed = embed, .scales = scales.get()}, {.stream = stream}));
  CUDA_OK(cudaDeviceSynchronize());
  std::vector<double> rows, inputs, sums(static_cast<size_t>(tokens) * slabs, 0.0);
  for (int t = 0; t < tokens; ++t) {
    const int id = ids[t] < 0 ? last[-1 - ids[t]] : ids[t];
    for (int k = 0; k < hidden; ++k) {
      rows.push_back(Double(table[static_cast<size_t>(id) * hidden + k]));
      inputs.push_back(rows.back() * Double(weight[k]) * kNormedInputFactor);
      sums[t * slabs + k / 128] += rows.back() * rows.back();
    }
  }
  const auto doubles = [](const std::vector<float>& values) {
    return std::vector<double>(values.begin(), values.end());
  };
  const FixedNumbers numbers(x.Get(), scales.Get(), tokens, hidden);
  return Report(
             "embedding of " + std::to_string(tokens) + " tokens, hidden " + std::to_string(hidden),
             rows, doubles(residual.Get()), 1e-7) &&
         Report("  the input it leaves", inputs, numbers.values, 5e-5) &&
         Report("  its sums", numbers.sums_of_values, numbers.sums, 1e-5) &&
         Report("  its sums of squares", sums, doubles(squares.Get()), 1e-5) &&
         Report("  its scales", std::vector<double>(tokens, 1.0), doubles(scale.Get()), 1e-7);
}

inline bool CheckMeetings(int multiprocessors, cudaStream_t stream) {
  bool ok = CheckFixedEmbed(16, 4096, stream);
  ok = CheckFixedEmbed(9, 1000, stream) && ok;
  for (const MeetingCase& c :
       {MeetingCase{4096, 4096, 128, 16, 6144, 128, true},
        MeetingCase{4096, 4096, 128, 16, 6144, 128, false},
        MeetingCase{4096, 1024, 128, 9, 1000, 128, true},
        MeetingCase{4096, 4096, 128, 32, 6144, 128, false},
        MeetingCase{4096, 14336, 128, 27, 512, 0, false},
        MeetingCase{576, 1536, 32, 19, 960, 64, false},
        MeetingCase{8192, 640, 128, 25, 1040, 64, false},
        MeetingCase{4096, 14336, 128, 15, 512, 0, false},
        MeetingCase{8192, 1024, 128, 13, 2560, 128, true},
        MeetingCase{512, 256, 128, 12, 34304, 128, true},
        MeetingCase{1408, 640, 64, 9, 17408, 128, true},
        MeetingCase{1408, 640, 64, 10, 37, 128, true},
        MeetingCase{576, 1536, 32, 16, 960, 64, false},
        MeetingCase{576, 576, 64, 9, 1536, 32, false}, MeetingCase{520, 2048, 0, 14, 300, 0, false},
        MeetingCase{8192, 640, 128, 11, 1040, 64, false}}) {
    ok = MeetingCheck(c, multiprocessors, stream).Run() && ok;
  }
  return ok;
}

}  // namespace nibble::cuda
