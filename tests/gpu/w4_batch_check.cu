// Checks the matrix products of many tokens against a plain kernel, then times a model's matrices.
// Needs a GPU.
//
//   w4_batch_check [check | time [MATRIX [TOKENS]]]

#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/w4_batch.h"
#include "kernels/cuda/w4_wgmma.h"
#include "tests/gpu/comparison.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/graph_timer.h"
#include "tests/gpu/w4_logical.cuh"
#include "tests/gpu/w4_meeting_check.cuh"

namespace nibble::cuda {
namespace {

constexpr double kReadBytesPerSecond = 4.65e12, kOperationsPerSecond = 790e12;
constexpr size_t kRotated = size_t{300} << 20;  // weights that no cache holds

struct Device {
  int multiprocessors = 0;
  cudaStream_t stream = nullptr;

  explicit Device(int count) : multiprocessors(count) { CUDA_OK(cudaStreamCreate(&stream)); }
  // Puts params.x into order first.
  void Multiply(const W4BatchParams& params, Real16* ordered, bool dependent,
                Real16* next = nullptr) const {
    const LaunchOptions options{.stream = stream, .dependent = dependent, .element = Tested()};
    CUDA_OK(OrderActivations({.x = params.x,
                              .tokens = params.tokens,
                              .columns = params.columns,
                              .group = params.group,
                              .ordered = ordered},
                             options));
    CUDA_OK(W4Wgmma(params, {.ordered = ordered, .next_ordered = next}, multiprocessors, options));
  }
};

struct Case {
  int rows, columns, group, tokens;
  DecodeOutput output;
  bool bias;
};

std::string NameOf(const Case& c) {
  const char* outputs[] = {"half", "float", "silu", "residual"};
  return std::string(TestedName()) + " " + std::to_string(c.rows) + " x " +
         std::to_string(c.columns) + " group " + std::to_string(c.group) + " tokens " +
         std::to_string(c.tokens) + " " + outputs[static_cast<int>(c.output)] +
         (c.bias ? " bias" : "");
}

// What the outputs must be, from the plain products. Bias is in packed order: only where rows are
// not paired.
std::vector<double> Want(const Case& c, const std::vector<double>& plain,
                         const std::vector<Real16>& bias, float old) {
  std::vector<double> want;
  const int out_rows = c.output == DecodeOutput::kSiluMul ? c.rows / 2 : c.rows;
  for (int t = 0; t < c.tokens; ++t) {
    const double* of_token = plain.data() + static_cast<size_t>(t) * c.rows;
    for (int r = 0; r < out_rows; ++r) {
      double value = of_token[r] + (c.bias ? Double(bias[r]) : 0);
      if (c.output == DecodeOutput::kSiluMul) {
        value = value / (1 + std::exp(-value)) * of_token[out_rows + r];
      }
      want.push_back(value + (c.output == DecodeOutput::kAddResidual ? old : 0));
    }
  }
  return want;
}

// What a product with SiLU leaves for the next one: the same numbers, in order.
bool CheckOrderedOutput(const Device& device, const W4BatchParams& params, const Real16* ordered,
                        const std::vector<Real16>& y) {
  const int columns = params.rows / 2;
  if (params.output != DecodeOutput::kSiluMul || columns % 128 != 0) return true;
  bool ok = true;
  for (const int group : {32, 64, 128}) {
    const size_t count = layout::GpuOrderedCount(params.tokens, columns);
    DeviceArray<Real16> next(std::vector<Real16>(count, ToReal(0)));
    CUDA_OK(W4Wgmma(params, {.ordered = ordered, .next_ordered = next.get(), .next_group = group},
                    device.multiprocessors, {.stream = device.stream, .element = Tested()}));
    CUDA_OK(cudaDeviceSynchronize());
    const std::vector<Real16> want = InOrder(y, params.tokens, columns, group), got = next.Get();
    ok = ok && std::memcmp(want.data(), got.data(), count * sizeof(Real16)) == 0;
  }
  if (!ok) std::printf("FAIL the next product's input\n");
  return ok;
}

// With parts, rows are in order and the residual is what it was and the parts; without, they stand
// the other way round. Parts of kSum are one sum in 16 bits.
constexpr int kSum = -1;
bool CheckNorm(int tokens, int hidden, int group, int part_count) {
  const size_t count = static_cast<size_t>(tokens) * hidden;
  std::vector<float> residual = Normal(count, 3);
  std::vector<float> parts = Normal(count * std::abs(part_count), 1);
  std::vector<Real16> sum(1);
  if (part_count == kSum) {
    sum.resize(count);
    for (size_t i = 0; i < count; ++i) parts[i] = ToFloat(sum[i] = ToReal(parts[i]));
  }
  const DeviceArray<Real16> device_sum(sum);
  const std::vector<Real16> weight = NormalReals(hidden, 1);
  DeviceArray<float> device_residual(residual);
  const DeviceArray<float> device_parts(parts);
  for (size_t i = 0; i < parts.size(); ++i) residual[i % count] += parts[i];
  const DeviceArray<Real16> device_weight(weight);
  std::vector<int32_t> rows;
  for (int t = 0; t < tokens; ++t) rows.push_back(part_count != 0 ? t : tokens - 1 - t);
  const DeviceArray<int32_t> device_rows(rows);
  std::vector<Real16> plain;
  std::vector<double> inverses;
  for (const int row : rows) {
    double squares = 0;
    const float* x = residual.data() + static_cast<size_t>(row) * hidden;
    for (int k = 0; k < hidden; ++k) squares += static_cast<double>(x[k]) * x[k];
    const double inverse = 1 / std::sqrt(squares / hidden + 1e-5);
    inverses.push_back(inverse);
    for (int k = 0; k < hidden; ++k) {
      plain.push_back(ToReal(static_cast<float>(x[k] * inverse * Double(weight[k]))));
    }
  }
  DeviceArray<Real16> ordered(
      std::vector<Real16>(layout::GpuOrderedCount(tokens, hidden), ToReal(0)));
  DeviceArray<float> inverse_rms(tokens);
  CUDA_OK(OrderedNorm({.residual = device_residual.get(),
                       .rows = part_count != 0 ? nullptr : device_rows.get(),
                       .weight = device_weight.get(),
                       .tokens = tokens,
                       .hidden = hidden,
                       .epsilon = 1e-5f,
                       .group = group,
                       .ordered = ordered.get(),
                       .parts = part_count > 0 ? device_parts.get() : nullptr,
                       .part_count = std::max(0, part_count),
                       .partial = part_count == kSum ? device_sum.get() : nullptr,
                       .inverse_rms_out = inverse_rms.get()},
                      {.element = Tested()}));
  CUDA_OK(cudaDeviceSynchronize());
  const std::vector<float> left = device_residual.Get();
  if (std::memcmp(left.data(), residual.data(), count * sizeof(float)) != 0) {
    std::printf("FAIL the residual behind a norm of %d parts\n", part_count);
    return false;
  }
  std::vector<double> want, got;
  for (const Real16 value : InOrder(plain, tokens, hidden, group)) want.push_back(Double(value));
  for (const Real16 value : ordered.Get()) got.push_back(Double(value));
  const std::vector<float> left_inverses = inverse_rms.Get();
  const std::vector<double> got_inverses(left_inverses.begin(), left_inverses.end());
  return Report("the inverse rms of a norm", inverses, got_inverses, 1e-5) &&
         Report("norm in order, tokens " + std::to_string(tokens) + " hidden " +
                    std::to_string(hidden) + " group " + std::to_string(group) + " parts " +
                    std::to_string(part_count),
                want, got, 1e-3);
}

// What blocks leave for a norm to add up: the results without the residual's old values.
bool CheckParts(const Device& device, const W4BatchParams& params, const Real16* ordered, float old,
                const std::vector<float>& whole) {
  if (params.output != DecodeOutput::kAddResidual || params.tokens > kWgmmaPartsTokens) return true;
  const int count = W4WgmmaParts(params, device.multiprocessors);
  DeviceArray<float> parts(std::vector<float>(whole.size() * count, NAN));
  CUDA_OK(W4Wgmma(params, {.ordered = ordered, .parts = parts.get()}, device.multiprocessors,
                  {.stream = device.stream, .element = Tested()}));
  CUDA_OK(cudaDeviceSynchronize());
  std::vector<double> got(whole.size(), old);
  const std::vector<float> left = parts.Get();
  for (size_t i = 0; i < left.size(); ++i) got[i % whole.size()] += left[i];
  return Report("  the same in " + std::to_string(count) + " parts",
                std::vector<double>(whole.begin(), whole.end()), got, 1e-6);
}

// The same with the hands of multiprocessors that have no tiles, twice alike.
bool CheckHelp(const Device& device, W4BatchParams params, const Real16* ordered,
               const std::vector<Real16>& whole) {
  const WgmmaHelp help = W4WgmmaHelp(params, device.multiprocessors);
  if (params.output != DecodeOutput::kSiluMul || help.blocks == 0) return true;
  DeviceArray<float> words(WgmmaHelpWords(params.rows));  // all bits are set
  std::vector<Real16> results[2];
  for (std::vector<Real16>& y : results) {
    DeviceArray<Real16> y_half(whole.size());
    params.y_half = y_half.get();
    CUDA_OK(W4Wgmma(params, {.ordered = ordered, .help = words.get()}, device.multiprocessors,
                    {.stream = device.stream, .element = Tested()}));
    CUDA_OK(cudaDeviceSynchronize());
    y = y_half.Get();
  }
  std::vector<double> want, got;
  for (const Real16 value : whole) want.push_back(Double(value));
  for (const Real16 value : results[0]) got.push_back(Double(value));
  bool ok = std::memcmp(results[0].data(), results[1].data(), whole.size() * sizeof(Real16)) == 0;
  for (const float word : words.Get()) {
    constexpr uint32_t kAllSet = 0xffffffffu;
    ok = ok && std::memcmp(&word, &kAllSet, sizeof(word)) == 0;
  }
  if (!ok) std::printf("FAIL help\n");
  return Report("  the same with " + std::to_string(help.blocks) + " helpers for " +
                    std::to_string(help.chunks) + " chunks",
                want, got, Limit(1e-3)) &&
         ok;
}

bool Check(const Case& c, const Device& device) {
  const bool silu = c.output == DecodeOutput::kSiluMul;
  const RandomMatrix matrix(c.rows, c.columns, c.group, silu);
  const size_t count = static_cast<size_t>(c.tokens) * (silu ? c.rows / 2 : c.rows);
  const DeviceArray<Real16> x(NormalReals(static_cast<size_t>(c.tokens) * c.columns, 1));
  const std::vector<Real16> bias = NormalReals(c.rows, 0.5f);
  const DeviceArray<Real16> device_bias(bias);
  constexpr float kOld = 0.25f;
  bool in_order = true;
  std::vector<float> floats[2];
  std::vector<Real16> halves[2];
  for (int run = 0; run < 2; ++run) {
    DeviceArray<Real16> y_half(count);
    DeviceArray<float> y_float(count), residual(std::vector<float>(count, kOld));
    const W4BatchParams params{.slabs = matrix.slabs(),
                               .rows = c.rows,
                               .columns = c.columns,
                               .group = c.group,
                               .tokens = c.tokens,
                               .x = x.get(),
                               .output = c.output,
                               .y_half = y_half.get(),
                               .y_float = y_float.get(),
                               .residual_out = residual.get(),
                               .bias = c.bias ? device_bias.get() : nullptr};
    DeviceArray<Real16> ordered(layout::GpuOrderedCount(c.tokens, c.columns));
    device.Multiply(params, ordered.get(), run == 1);
    CUDA_OK(cudaDeviceSynchronize());
    floats[run] = c.output == DecodeOutput::kFloat ? y_float.Get() : residual.Get();
    halves[run] = y_half.Get();
    in_order = in_order && CheckOrderedOutput(device, params, ordered.get(), halves[run]) &&
               CheckParts(device, params, ordered.get(), kOld, floats[run]) &&
               CheckHelp(device, params, ordered.get(), halves[run]);
  }
  std::vector<double> got;
  const bool is_half = silu || c.output == DecodeOutput::kHalf;
  for (size_t i = 0; i < count; ++i) got.push_back(is_half ? Double(halves[0][i]) : floats[0][i]);
  const bool right =
      Report(NameOf(c), Want(c, matrix.Product(x.get(), c.tokens), bias, kOld), got, Limit(1e-3));
  const bool same = std::memcmp(halves[0].data(), halves[1].data(), count * sizeof(Real16)) == 0 &&
                    std::memcmp(floats[0].data(), floats[1].data(), count * sizeof(float)) == 0;
  if (!same) std::printf("FAIL %s: a second run differs\n", NameOf(c).c_str());
  return right && same && in_order;
}

bool CheckAll(const Device& device) {
  using enum DecodeOutput;
  bool ok = CheckNorm(17, 576, 64, 0);
  ok = CheckNorm(100, 4096, 128, 0) && ok;
  ok = CheckNorm(256, 1032, 0, 0) && ok;
  ok = CheckNorm(17, 576, 64, 1) && ok;
  ok = CheckNorm(33, 4096, 128, 8) && ok;
  ok = CheckNorm(64, 18440, 32, 5) && ok;
  ok = CheckNorm(70, 4096, 128, kSum) && ok;
  ok = CheckNorm(65, 18440, 32, kSum) && ok;
  ok = (Tested() != Element::kHalf || CheckMeetings(device.multiprocessors, device.stream)) && ok;
  for (const Case& c : {Case{512, 1024, 128, 32, kFloat, false},
                        Case{4096, 4096, 128, 16, kAddResidual, true},
                        Case{6144, 4096, 128, 9, kHalf, true},
                        Case{3328, 4096, 128, 12, kSiluMul, false},
                        Case{960, 576, 64, 11, kFloat, true},
                        Case{576, 1536, 32, 16, kAddResidual, true},
                        Case{5000, 1024, 0, 13, kFloat, true},
                        Case{37, 128, 128, 1, kHalf, true},
                        Case{37, 128, 128, 17, kHalf, true},
                        Case{2560, 4096, 128, 24, kHalf, true},
                        Case{6144, 4096, 128, 32, kHalf, false},
                        Case{3328, 4096, 128, 33, kSiluMul, false},
                        Case{1000, 14336, 128, 48, kFloat, false},
                        Case{28672, 4096, 128, 32, kSiluMul, false},
                        Case{28600, 3968, 128, 29, kSiluMul, false},
                        Case{57344, 4096, 128, 20, kSiluMul, false},
                        Case{4096, 4096, 128, 64, kAddResidual, true},
                        Case{4096, 14336, 128, 32, kAddResidual, false},
                        Case{1000, 256, 128, 20, kAddResidual, true},
                        Case{520, 2048, 0, 40, kAddResidual, true},
                        Case{960, 576, 64, 17, kFloat, true},
                        Case{960, 576, 64, 100, kHalf, false},
                        Case{576, 1536, 32, 40, kAddResidual, true},
                        Case{576, 1536, 32, 130, kHalf, false},
                        Case{3072, 960, 64, 61, kSiluMul, false},
                        Case{300, 4096, 0, 19, kFloat, false},
                        Case{5000, 1024, 0, 64, kFloat, true},
                        Case{5000, 1032, 0, 90, kFloat, false},
                        Case{3000, 2048, 0, 256, kFloat, false},
                        Case{3168, 4096, 128, 96, kSiluMul, false},
                        Case{3168, 4096, 128, 128, kSiluMul, false},
                        Case{4096, 2048, 128, 129, kAddResidual, false},
                        Case{6144, 1024, 128, 192, kHalf, true},
                        Case{1040, 4096, 128, 256, kAddResidual, true},
                        Case{9000, 1024, 128, 300, kFloat, true},
                        Case{12288, 512, 128, 250, kSiluMul, false},
                        Case{12544, 256, 128, 256, kSiluMul, false},
                        Case{13000, 512, 128, 500, kHalf, true},
                        Case{16384, 256, 128, 256, kAddResidual, false},
                        Case{28672, 256, 128, 1000, kSiluMul, false},
                        Case{1000, 576, 64, 1000, kSiluMul, false},
                        Case{37, 128, 128, 1020, kHalf, true},
                        Case{6144, 640, 128, 1024, kHalf, true},
                        Case{1040, 1536, 32, 750, kFloat, true},
                        Case{5000, 1024, 64, 1010, kHalf, false},
                        Case{4096, 1024, 128, 2040, kAddResidual, false}}) {
    ok = Check(c, device) && ok;
  }
  return ok;
}

// Microseconds of one of the operations that `run` puts on the stream `times` times, from a graph.
double Time(cudaStream_t stream, int times, const std::function<void(int)>& run) {
  return TimeGraph(stream, 2, 7,
                   [&] {
                     for (int i = 0; i < times; ++i) run(i);
                   })
             .median_us /
         times;
}

struct Matrix {
  const char* name;
  int rows, columns, group;
  DecodeOutput output;
};

// Copies of one random matrix, as many as no cache holds.
class Rotated {
 public:
  explicit Rotated(const Matrix& m)
      : bytes_(W4DecodeBytes(m.rows, m.columns, m.group)),
        copies_(static_cast<int>(kRotated / bytes_) + 1),
        slabs_(bytes_ * copies_) {
    const size_t count = static_cast<size_t>(m.rows) * m.columns;
    const size_t groups = m.group == 0 ? 1 : count / m.group;
    DeviceArray<uint8_t> q(m.group == 0 ? 1 : count), zeros(groups);
    DeviceArray<half> scales(groups);
    DeviceArray<Real16> dense(m.group == 0 ? count : 1);
    CUDA_OK(FillRandomBytes(q.get(), m.group == 0 ? 1 : count, 1, nullptr));
    CUDA_OK(FillRandomBytes(zeros.get(), groups, 2, nullptr));
    CUDA_OK(FillRandomReals(reinterpret_cast<Real16*>(scales.get()), groups, 0.005f, 0.001f, 3,
                            {.element = Element::kHalf}));
    CUDA_OK(
        FillRandomReals(dense.get(), m.group == 0 ? count : 1, 0, 0.02f, 4, {.element = Tested()}));
    CUDA_OK(PackW4({.q = q.get(),
                    .zeros = zeros.get(),
                    .scales = scales.get(),
                    .dense = dense.get(),
                    .rows = m.rows,
                    .columns = m.columns,
                    .group = m.group,
                    .pair_rows = m.output == DecodeOutput::kSiluMul,
                    .slabs = slabs_.get()},
                   nullptr));
    for (int i = 1; i < copies_; ++i) {
      CUDA_OK(cudaMemcpy(slabs_.get() + i * bytes_, slabs_.get(), bytes_, cudaMemcpyDefault));
    }
  }
  [[nodiscard]] const uint8_t* copy(int i) const { return slabs_.get() + i % copies_ * bytes_; }
  [[nodiscard]] int copies() const { return copies_; }
  [[nodiscard]] size_t bytes() const { return bytes_; }

 private:
  const size_t bytes_;
  const int copies_;
  DeviceArray<uint8_t> slabs_;
};

// With the norm behind it, which adds up parts or finds a whole residual.
void TimeNorms(const Matrix& m, const Device& device, int tokens,
               const std::function<W4BatchParams(int)>& params, Real16* ordered) {
  if (m.output != DecodeOutput::kAddResidual || tokens > kWgmmaPartsTokens) return;
  const int count = W4WgmmaParts(params(0), device.multiprocessors);
  const size_t values = static_cast<size_t>(tokens) * m.rows;
  DeviceArray<float> parts(values * count), residual(std::vector<float>(values, 0.0f));
  DeviceArray<Real16> weight(m.rows), normed(layout::GpuOrderedCount(tokens, m.rows));
  const LaunchOptions options{.stream = device.stream, .dependent = true, .element = Tested()};
  double us[2];
  for (const bool in_parts : {false, true}) {
    us[in_parts] = Time(device.stream, 16, [&](int i) {
      CUDA_OK(W4Wgmma(params(i), {.ordered = ordered, .parts = in_parts ? parts.get() : nullptr},
                      device.multiprocessors, options));
      CUDA_OK(OrderedNorm({.residual = in_parts ? residual.get() : params(i).residual_out,
                           .weight = weight.get(),
                           .tokens = tokens,
                           .hidden = m.rows,
                           .epsilon = 1e-5f,
                           .ordered = normed.get(),
                           .parts = in_parts ? parts.get() : nullptr,
                           .part_count = count},
                          options));
    });
  }
  std::printf("%-8s tokens %5d: with a norm %.1f us, in %d parts %.1f us\n", m.name, tokens, us[0],
              count, us[1]);
}

void TimeMatrix(const Matrix& m, Device* device, const std::vector<int>& token_counts) {
  const Rotated weights(m);
  const size_t most = token_counts.back();
  DeviceArray<Real16> x(most * m.columns), y_half(most * m.rows);
  DeviceArray<float> y(std::vector<float>(most * m.rows, 0.0f));
  DeviceArray<Real16> ordered(layout::GpuOrderedCount(token_counts.back(), m.columns));
  // As in a model, SiLU leaves its results in order.
  Real16* next = m.output == DecodeOutput::kSiluMul ? y_half.get() : nullptr;
  CUDA_OK(FillRandomReals(x.get(), most * m.columns, 0, 1, 5, {.element = Tested()}));
  CUDA_OK(cudaDeviceSynchronize());
  for (const int tokens : token_counts) {
    const auto params = [&](int i) {
      return W4BatchParams{.slabs = weights.copy(i),
                           .rows = m.rows,
                           .columns = m.columns,
                           .group = m.group,
                           .tokens = tokens,
                           .x = x.get(),
                           .output = m.output,
                           .y_half = y_half.get(),
                           .y_float = y.get(),
                           .residual_out = y.get()};
    };
    const int times = std::max(tokens > 256 ? 4 : 16, weights.copies());
    const double us = Time(device->stream, times,
                           [&](int i) { device->Multiply(params(i), ordered.get(), true, next); });
    TimeNorms(m, *device, tokens, params, ordered.get());
    const double operations = 2.0 * m.rows * m.columns * tokens;
    const double floor =
        1e6 * std::max(weights.bytes() / kReadBytesPerSecond, operations / kOperationsPerSecond);
    std::printf("%-8s tokens %5d: %8.1f us %6.1f TFLOP/s %5.2f TB/s %5.1f %% of the floor", m.name,
                tokens, us, operations / us / 1e6, weights.bytes() / us / 1e6, floor / us * 100);
    std::printf("\n");
  }
}

// Every matrix and count of tokens, or those named.
void TimeAll(Device* device, const std::string& name, int tokens) {
  using enum DecodeOutput;
  for (const Matrix& m :
       {Matrix{"qkv", 6144, 4096, 128, kHalf}, Matrix{"o", 4096, 4096, 128, kAddResidual},
        Matrix{"gate-up", 28672, 4096, 128, kSiluMul},
        Matrix{"down", 4096, 14336, 128, kAddResidual}, Matrix{"head", 32000, 4096, 0, kFloat}}) {
    if (!name.empty() && name != m.name) continue;
    if (tokens > 0) {
      TimeMatrix(m, device, {tokens});
    } else if (m.group == 0) {
      TimeMatrix(m, device, {32, 64, 128, 256});
    } else {
      TimeMatrix(m, device, {32, 64, 96, 128, 256, 512, 2048});
    }
  }
}

int Main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // a launch that hangs must not hide what came before
  cudaDeviceProp properties;
  CUDA_OK(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s, %d multiprocessors\n", properties.name, properties.multiProcessorCount);
  Device device(properties.multiProcessorCount);
  const std::string what = argc > 1 ? argv[1] : "";
  bool ok = true;
  for (const Element element : {Element::kBfloat16, Element::kHalf}) {
    Tested() = element;
    if (what != "time") ok = CheckAll(device) && ok;
  }
  if (what != "check") {
    TimeAll(&device, argc > 2 ? argv[2] : "", argc > 3 ? std::stoi(argv[3]) : 0);
  }
  std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace nibble::cuda

int main(int argc, char** argv) { return nibble::cuda::Main(argc, argv); }
