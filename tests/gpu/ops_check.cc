// Checks matrix products of many tokens and sampling against plain computations, at odd sizes.
// Needs a GPU.
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/w4_batch.h"
#include "kernels/sampling/random.h"
#include "tests/gpu/comparison.h"
#include "tests/gpu/device_array.h"
#include "worker/execution/cpu/row_sampler.h"

namespace nibble::cuda {
namespace {

struct BatchCase {
  int32_t rows, columns, group, tokens;
  DecodeOutput output;
  bool bias;
};

struct Logical {
  std::vector<uint8_t> q, zeros;
  std::vector<half> scales;
  std::vector<Real16> dense;

  explicit Logical(const BatchCase& c) {
    const auto count = static_cast<size_t>(c.rows) * static_cast<size_t>(c.columns);
    if (c.group == 0) {
      dense = NormalReals(count, 0.02f);
      return;
    }
    const size_t groups = count / static_cast<size_t>(c.group);
    for (size_t i = 0; i < count; ++i) q.push_back(static_cast<uint8_t>(Random()() % 16));
    for (size_t i = 0; i < groups; ++i) {
      zeros.push_back(static_cast<uint8_t>(Random()() % 16));
      scales.push_back(__float2half(0.001f + 0.00001f * static_cast<float>(Random()() % 1000)));
    }
  }
  [[nodiscard]] double Weight(const BatchCase& c, int32_t row, int32_t k) const {
    const auto at =
        static_cast<size_t>(row) * static_cast<size_t>(c.columns) + static_cast<size_t>(k);
    if (c.group == 0) return Double(dense[at]);
    const size_t group = at / static_cast<size_t>(c.group);
    return (q[at] - zeros[group]) * static_cast<double>(__half2float(scales[group]));
  }
};

std::vector<double> PlainProduct(const BatchCase& c, const Logical& w, const std::vector<Real16>& x,
                                 const std::vector<Real16>& bias) {
  std::vector<double> y;
  std::vector<double> row_weights(static_cast<size_t>(c.columns));
  y.resize(static_cast<size_t>(c.tokens) * static_cast<size_t>(c.rows));
  for (int32_t row = 0; row < c.rows; ++row) {
    for (int32_t k = 0; k < c.columns; ++k) {
      row_weights[static_cast<size_t>(k)] = w.Weight(c, row, k);
    }
    for (int32_t token = 0; token < c.tokens; ++token) {
      double sum = c.bias ? Double(bias[static_cast<size_t>(row)]) : 0;
      for (int32_t k = 0; k < c.columns; ++k) {
        sum += row_weights[static_cast<size_t>(k)] *
               Double(x[static_cast<size_t>(token) * static_cast<size_t>(c.columns) +
                        static_cast<size_t>(k)]);
      }
      y[static_cast<size_t>(token) * static_cast<size_t>(c.rows) + static_cast<size_t>(row)] = sum;
    }
  }
  return y;
}

// The bias as the packed rows lie.
std::vector<Real16> Packed(const std::vector<Real16>& bias, bool pairs) {
  if (!pairs) return bias;
  std::vector<Real16> packed(bias.size());
  for (size_t i = 0; i < bias.size() / 2; ++i) {
    packed[i / 8 * 16 + i % 8] = bias[i];
    packed[i / 8 * 16 + 8 + i % 8] = bias[bias.size() / 2 + i];
  }
  return packed;
}

bool CheckBatch(const BatchCase& c) {
  const Logical w(c);
  const auto rows = static_cast<size_t>(c.rows), tokens = static_cast<size_t>(c.tokens);
  const std::vector<Real16> x = NormalReals(tokens * static_cast<size_t>(c.columns), 1);
  const std::vector<Real16> bias = NormalReals(rows, 1);
  const bool silu = c.output == DecodeOutput::kSiluMul;
  const DeviceArray<uint8_t> q(w.q.empty() ? std::vector<uint8_t>(1) : w.q);
  const DeviceArray<uint8_t> zeros(w.zeros.empty() ? std::vector<uint8_t>(1) : w.zeros);
  const DeviceArray<half> scales(w.scales.empty() ? std::vector<half>(1) : w.scales);
  const DeviceArray<Real16> dense(w.dense.empty() ? std::vector<Real16>(1) : w.dense);
  const DeviceArray<Real16> dx(x), dbias(Packed(bias, silu));
  const DeviceArray<uint8_t> slabs(static_cast<size_t>(W4DecodeBytes(c.rows, c.columns, c.group)));
  CUDA_OK(PackW4({.q = q.get(),
                  .zeros = zeros.get(),
                  .scales = scales.get(),
                  .dense = dense.get(),
                  .rows = c.rows,
                  .columns = c.columns,
                  .group = c.group,
                  .pair_rows = silu,
                  .slabs = slabs.get()},
                 nullptr));
  const size_t out_rows = silu ? rows / 2 : rows;
  const DeviceArray<Real16> y_half(tokens * out_rows);
  const DeviceArray<float> y_float(tokens * out_rows);
  const DeviceArray<float> residual(std::vector<float>(tokens * rows, 0.25f));
  const W4BatchParams params{.slabs = slabs.get(),
                             .rows = c.rows,
                             .columns = c.columns,
                             .group = c.group,
                             .tokens = c.tokens,
                             .x = dx.get(),
                             .output = c.output,
                             .y_half = y_half.get(),
                             .y_float = y_float.get(),
                             .residual_out = residual.get(),
                             .bias = c.bias ? dbias.get() : nullptr};
  CUDA_OK(W4Batch(params, {.element = Tested()}));
  CUDA_OK(cudaDeviceSynchronize());
  std::vector<double> want = PlainProduct(c, w, x, bias), got;
  if (c.output == DecodeOutput::kAddResidual) {
    for (double& value : want) value += 0.25;
    for (const float value : residual.Get()) got.push_back(static_cast<double>(value));
  } else if (c.output == DecodeOutput::kFloat) {
    for (const float value : y_float.Get()) got.push_back(static_cast<double>(value));
  } else {
    for (const Real16 value : y_half.Get()) got.push_back(Double(value));
  }
  if (silu) {
    std::vector<double> paired;
    for (size_t t = 0; t < tokens; ++t) {
      for (size_t r = 0; r < out_rows; ++r) {
        const double gate = want[t * rows + r];
        paired.push_back(gate / (1 + std::exp(-gate)) * want[t * rows + out_rows + r]);
      }
    }
    want = paired;
  }
  return Report(std::string(TestedName()) + " product rows " + std::to_string(c.rows) +
                    " columns " + std::to_string(c.columns) + " group " + std::to_string(c.group) +
                    " tokens " + std::to_string(c.tokens) + " output " +
                    std::to_string(static_cast<int>(c.output)),
                want, got, Limit(1.5e-3));
}

// The device's token, and the host sampler's from the same logits.
// With one block a row, and with several.
bool CheckSample(int32_t vocab, double temperature, bool several) {
  constexpr int32_t kRows = 5;
  std::vector<float> logits = Normal(static_cast<size_t>(kRows * vocab), 3);
  if (vocab > 7) logits[7] = logits[3] = 50;  // a tie in row 0
  std::vector<SampleRow> rows;
  step::SamplingParams params;
  params.temperature = static_cast<float>(temperature);
  for (int32_t row = 0; row < kRows; ++row) {
    rows.push_back(
        {.stream = sampling::OutputStream(99, static_cast<uint64_t>(row)),
         .inverse_temperature = temperature > 0 ? 1.0 / static_cast<double>(params.temperature) : 0,
         .slot = row});
  }
  const auto last = static_cast<size_t>(kRows - 1) * static_cast<size_t>(vocab);
  logits[last + static_cast<size_t>(vocab / 2)] = NAN;
  const DeviceArray<float> dlogits(logits);
  const DeviceArray<SampleRow> drows(rows);
  const DeviceArray<SampledToken> sampled(kRows);
  const DeviceArray<int32_t> tokens(kRows);
  const DeviceArray<SampleScratch> scratch(std::vector<SampleScratch>(1));
  for (int run = 0; run < 2; ++run) {  // the first must leave the scratch as it was
    CUDA_OK(Sample({.logits = dlogits.get(),
                    .rows = drows.get(),
                    .count = kRows,
                    .vocab_size = vocab,
                    .sampled = sampled.get(),
                    .last_tokens = tokens.get(),
                    .scratch = several ? scratch.get() : nullptr},
                   {}));
  }
  const std::vector<SampledToken> got = sampled.Get();
  bool ok = got[kRows - 1].non_finite == 1;
  for (int32_t row = 0; row + 1 < kRows; ++row) {
    const std::span<float> here(
        logits.data() + static_cast<size_t>(row) * static_cast<size_t>(vocab),
        static_cast<size_t>(vocab));
    const execution::RowRequest request{
        .params = &params, .seed = 99, .output_index = static_cast<uint64_t>(row)};
    const execution::Candidate want = execution::BestOf(request, 0, here);
    ok = ok && got[static_cast<size_t>(row)].non_finite == 0 &&
         got[static_cast<size_t>(row)].token_id == want.token_id &&
         tokens.Get()[static_cast<size_t>(row)] == want.token_id;
  }
  std::printf("%-4s sampling of %d tokens at temperature %.2f, %s\n", ok ? "ok" : "FAIL", vocab,
              temperature, several ? "several blocks a row" : "one block a row");
  return ok;
}

bool CheckBatches() {
  bool ok = true;
  for (const int32_t tokens : {1, 17, 31, 33, 65, 130, 257}) {
    for (const BatchCase& c : {BatchCase{384, 1024, 128, tokens, DecodeOutput::kHalf, true},
                               BatchCase{208, 576, 64, tokens, DecodeOutput::kFloat, false},
                               BatchCase{176, 160, 32, tokens, DecodeOutput::kAddResidual, true},
                               BatchCase{352, 384, 128, tokens, DecodeOutput::kSiluMul, true},
                               BatchCase{300, 264, 0, tokens, DecodeOutput::kFloat, true},
                               BatchCase{37, 128, 128, tokens, DecodeOutput::kHalf, false}}) {
      ok = CheckBatch(c) && ok;
    }
  }
  return ok;
}

}  // namespace
}  // namespace nibble::cuda

int main() {
  using namespace nibble::cuda;
  bool ok = true;
  for (const Element element : {Element::kHalf, Element::kBfloat16}) {
    Tested() = element;
    ok = CheckBatches() && ok;
  }
  for (const int32_t vocab : {5, 32000, 49153, 128256}) {
    for (const double temperature : {0.0, 0.7, 1.3}) {
      for (const bool several : {false, true}) ok = CheckSample(vocab, temperature, several) && ok;
    }
  }
  std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
  return ok ? 0 : 1;
}
