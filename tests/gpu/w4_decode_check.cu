// Checks the decode matrix product against a plain kernel, then times the chain of a model's
// matrices as a graph. Needs a GPU.
//
//   w4_decode_check [json]
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/w4_decode.h"
#include "tests/gpu/comparison.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/graph_timer.h"
#include "tests/gpu/w4_logical.cuh"

namespace nibble::cuda {
namespace {

struct Case {
  int rows, columns, group, tokens;
  bool normed;
  DecodeOutput output;
  bool fragments = false;  // activations lie in the order of fragments, before and behind
};

// Values as they lie, [tokens][columns] when they are in order.
std::vector<Real16> InFragments(const std::vector<Real16>& rows, int tokens, int columns,
                                const layout::GpuFragmentOrder& order) {
  std::vector<Real16> fragments(layout::GpuFragmentCount(tokens, columns), ToReal(NAN));
  for (int t = 0; t < tokens; ++t) {
    for (int k = 0; k < columns; ++k) {
      fragments[order.Index(t, k, columns)] = rows[static_cast<size_t>(t) * columns + k];
    }
  }
  return fragments;
}

double RelativeError(const std::vector<double>& expected, const std::vector<double>& actual) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double d = expected[i] - actual[i];
    difference += std::isfinite(d) ? d * d : 1e30;
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);
}

// Inputs on the host: as the reference takes them, and as the kernel does.
struct Inputs {
  std::vector<Real16> plain, given;
  std::vector<float> squares, scales;
};
constexpr int kParts = 7;

Inputs MakeInputs(const Case& c) {
  std::mt19937 random(99);
  std::normal_distribution<float> normal(0, 1);
  Inputs in;
  in.squares.assign(static_cast<size_t>(c.tokens) * kParts, 0.0f);
  std::vector<float> norm_weight(c.columns);
  for (auto& value : norm_weight) value = 0.5f + 0.1f * normal(random);
  for (int t = 0; t < c.tokens; ++t) {
    std::vector<float> residual(c.columns);
    double sum = 0;
    for (int k = 0; k < c.columns; ++k) {
      residual[k] = normal(random);
      in.squares[t * kParts + k % kParts] += residual[k] * residual[k];
      sum += static_cast<double>(residual[k]) * residual[k];
    }
    const float inverse = static_cast<float>(1.0 / std::sqrt(sum / c.columns + 1e-5));
    in.scales.push_back(inverse * (0.3f + 0.4f * static_cast<float>(t)));
    for (int k = 0; k < c.columns; ++k) {
      const float weighted = residual[k] * norm_weight[k];
      in.plain.push_back(ToReal(c.normed ? weighted * inverse : residual[k]));
      in.given.push_back(c.normed ? ToReal(weighted * in.scales.back() * kNormedInputFactor)
                                  : in.plain.back());
    }
  }
  return in;
}

// True when the kernel agrees with the reference.
bool Check(const Case& c, int multiprocessors) {
  const bool silu = c.output == DecodeOutput::kSiluMul;
  const RandomMatrix w(c.rows, c.columns, c.group, silu);
  const Inputs in = MakeInputs(c);
  const auto order = layout::GpuFragments(c.tokens, c.group);
  // What is left behind is in the order for other weights than these.
  const auto behind = c.fragments ? layout::GpuFragments(c.tokens, c.group == 64 ? 128 : 64)
                                  : layout::GpuFragmentOrder{};
  DeviceArray<Real16> dx(in.plain);
  DeviceArray<Real16> dgiven(c.fragments ? InFragments(in.given, c.tokens, c.columns, order)
                                         : in.given);
  DeviceArray<float> dsquares(in.squares), dscales(in.scales);
  const int out_rows = silu ? c.rows / 2 : c.rows;
  std::vector<float> old(static_cast<size_t>(c.tokens) * c.rows, 0.25f);
  DeviceArray<Real16> y_half(layout::GpuFragmentCount(c.tokens, out_rows));
  DeviceArray<float> y_float(static_cast<size_t>(c.tokens) * out_rows), residual_out(old);
  const int square_parts = layout::GpuRowTiles(c.rows);
  DeviceArray<float> squares_out(std::vector<float>(c.tokens * square_parts, 1e30f)),
      inverse_out(c.tokens);
  DeviceArray<Real16> next_x(layout::GpuFragmentCount(c.tokens, c.rows));
  DeviceArray<Real16> next_weight(std::vector<Real16>(c.rows, ToReal(0.75f)));
  W4DecodeParams p;
  p.slabs = w.slabs();
  p.rows = c.rows;
  p.columns = c.columns;
  p.group = c.group;
  p.tokens = c.tokens;
  p.x = dgiven.get();
  if (c.fragments) p.x_order = order;
  if (c.normed) {
    p.normed = {dscales.get(), dsquares.get(), kParts, 1e-5f, inverse_out.get()};
  }
  p.output = c.output;
  p.y_half = y_half.get();
  p.y_order = behind;
  p.y_float = y_float.get();
  p.residual_out = residual_out.get();
  p.next = {next_x.get(), next_weight.get(), dscales.get(), squares_out.get(), behind};
  p.element = Tested();
  CUDA_OK(W4Decode(p, multiprocessors, nullptr));
  CUDA_OK(cudaDeviceSynchronize());

  const std::vector<double> plain = w.Product(dx.get(), c.tokens);
  std::vector<double> want, got;
  double square_error = 0;
  if (c.output == DecodeOutput::kAddResidual) {
    const auto out = residual_out.Get();
    const auto sums = squares_out.Get();
    const auto next = next_x.Get();
    for (int t = 0; t < c.tokens; ++t) {
      double total = 0, reported = 0;
      for (int r = 0; r < c.rows; ++r) {
        const size_t at = static_cast<size_t>(t) * c.rows + r;
        want.push_back(plain[at] + 0.25);
        got.push_back(out[at]);
        total += want.back() * want.back();
        want.push_back(want.back() * 0.75);
        got.push_back(ToFloat(next[behind.Index(t, r, c.rows)]) /
                      (in.scales[t] * kNormedInputFactor));
      }
      for (int b = 0; b < square_parts; ++b) reported += sums[t * square_parts + b];
      square_error = std::max(square_error, std::abs(reported / total - 1));
    }
  } else if (silu) {
    const auto out = y_half.Get();
    for (int t = 0; t < c.tokens; ++t) {
      for (int r = 0; r < out_rows; ++r) {
        const double gate = plain[static_cast<size_t>(t) * c.rows + r];
        const double up = plain[static_cast<size_t>(t) * c.rows + out_rows + r];
        want.push_back(gate / (1 + std::exp(-gate)) * up);
        got.push_back(ToFloat(out[behind.Index(t, r, out_rows)]));
      }
    }
  } else if (c.output == DecodeOutput::kFloat) {
    const auto out = y_float.Get();
    want = plain;
    got.assign(out.begin(), out.end());
  } else {
    const auto out = y_half.Get();
    want = plain;
    for (size_t i = 0; i < want.size(); ++i) got.push_back(ToFloat(out[i]));
  }
  const double error = RelativeError(want, got);
  const bool ok = error < Limit(1e-3) && square_error < Limit(1e-3);
  std::printf(
      "%-4s %s rows %6d columns %6d group %3d tokens %2d normed %d output %d fragments %d error "
      "%.2e "
      "squares %.1e\n",
      ok ? "ok" : "FAIL", TestedName(), c.rows, c.columns, c.group, c.tokens,
      static_cast<int>(c.normed), static_cast<int>(c.output), static_cast<int>(c.fragments), error,
      square_error);
  return ok;
}

struct Chain {
  const char* name;
  int hidden, ffn, qkv_rows, layers, vocab;
};

struct Matrix {
  int rows, columns;
  bool normed;
  DecodeOutput output;
};

// Every matrix packed from random numbers made on the device.
void FillWeights(const Chain& chain, const Matrix (&layer)[4], uint8_t* weights) {
  int64_t most = static_cast<int64_t>(chain.vocab) * chain.hidden;
  for (const auto& m : layer) most = std::max(most, static_cast<int64_t>(m.rows) * m.columns);
  DeviceArray<uint8_t> q(most), zeros(most / 128);
  DeviceArray<half> scales(most / 128);
  DeviceArray<Real16> dense(static_cast<size_t>(chain.vocab) * chain.hidden);
  int64_t offset = 0;
  const auto pack = [&](const Matrix& m, int group) {
    const int64_t count = static_cast<int64_t>(m.rows) * m.columns;
    const uint32_t seed = static_cast<uint32_t>(offset >> 8);
    CUDA_OK(FillRandomBytes(q.get(), count, seed, nullptr));
    CUDA_OK(FillRandomBytes(zeros.get(), count / 128, seed + 1, nullptr));
    CUDA_OK(FillRandomReals(reinterpret_cast<Real16*>(scales.get()), count / 128, 0.005f, 0.001f,
                            seed + 2, {.element = Element::kHalf}));
    CUDA_OK(PackW4({.q = q.get(),
                    .zeros = zeros.get(),
                    .scales = scales.get(),
                    .dense = dense.get(),
                    .rows = m.rows,
                    .columns = m.columns,
                    .group = group,
                    .pair_rows = m.output == DecodeOutput::kSiluMul,
                    .slabs = weights + offset},
                   nullptr));
    offset += W4DecodeBytes(m.rows, m.columns, group);
  };
  for (int l = 0; l < chain.layers; ++l) {
    for (const auto& m : layer) pack(m, 128);
  }
  CUDA_OK(FillRandomReals(dense.get(), static_cast<int64_t>(chain.vocab) * chain.hidden, 0, 0.02f,
                          9, {.element = Tested()}));
  pack({chain.vocab, chain.hidden, true, DecodeOutput::kFloat}, 0);
  CUDA_OK(cudaDeviceSynchronize());
}

// Stands where attention stands, between qkv and o: the same footprint, one trip to the L2.
struct BetweenParams {
  const Real16* from;
  Real16* to;
};
__global__ void __launch_bounds__(256, 2) BetweenKernel(const __grid_constant__ BetweenParams p) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  const int at = blockIdx.x * 256 + threadIdx.x;
  if (at < 4096) p.to[at] = p.from[at];
}

// Times one decode step's matrices, in order, as a graph with dependent launches; `between`: with a
// stand-in for attention.
void Time(const Chain& chain, int tokens, bool between, int multiprocessors, FILE* json) {
  const bool dependent = true;
  const Matrix layer[4] = {{chain.qkv_rows, chain.hidden, true, DecodeOutput::kHalf},
                           {chain.hidden, chain.hidden, false, DecodeOutput::kAddResidual},
                           {2 * chain.ffn, chain.hidden, true, DecodeOutput::kSiluMul},
                           {chain.hidden, chain.ffn, false, DecodeOutput::kAddResidual}};
  int64_t layer_bytes = 0;
  for (const auto& m : layer) layer_bytes += W4DecodeBytes(m.rows, m.columns, 128);
  const int64_t head_bytes = W4DecodeBytes(chain.vocab, chain.hidden, 0);
  DeviceArray<uint8_t> weights(layer_bytes * chain.layers + head_bytes);
  FillWeights(chain, layer, weights.get());
  const size_t t = tokens;
  const int parts = layout::GpuRowTiles(chain.hidden);
  DeviceArray<float> residual(std::vector<float>(t * chain.hidden, 0.01f));
  DeviceArray<float> squares(std::vector<float>(t * parts, 1.0f));
  DeviceArray<float> scales(std::vector<float>(t, 1.0f)), scales_out(t);
  DeviceArray<Real16> norm(std::vector<Real16>(chain.hidden, ToReal(1.0f)));
  const int64_t widest = layout::GpuFragmentCount(tokens, std::max(chain.ffn, chain.qkv_rows));
  DeviceArray<Real16> normed(std::vector<Real16>(widest, ToReal(0.01f)));
  DeviceArray<Real16> y(std::vector<Real16>(widest, ToReal(0.01f)));
  DeviceArray<Real16> y2(std::vector<Real16>(widest, ToReal(0.01f)));
  DeviceArray<float> logits(t * chain.vocab);
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  int64_t offset = 0;
  const auto run = [&](const Matrix& m, int group, const Real16* x, Real16* out, float* out_float) {
    W4DecodeParams p;
    p.slabs = weights.get() + offset;
    offset += W4DecodeBytes(m.rows, m.columns, group);
    p.rows = m.rows;
    p.columns = m.columns;
    p.group = group;
    p.tokens = tokens;
    p.x = m.normed ? normed.get() : x;
    p.x_order = layout::GpuFragments(tokens, group);
    p.y_order = layout::GpuFragments(tokens, 128);
    if (m.normed) p.normed = {scales.get(), squares.get(), parts, 1e-5f, scales_out.get()};
    p.output = m.output;
    p.y_half = out;
    p.y_float = out_float;
    p.residual_out = residual.get();
    p.next = {normed.get(), norm.get(), scales.get(), squares.get(),
              layout::GpuFragments(tokens, 128)};
    p.dependent_launch = dependent;
    p.element = Tested();
    CUDA_OK(W4Decode(p, multiprocessors, stream));
  };
  const auto step = [&] {
    for (int l = 0; l < chain.layers; ++l) {
      run(layer[0], 128, nullptr, y.get(), nullptr);
      if (between) {
        CUDA_OK(cudaFuncSetAttribute(BetweenKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     kDecodeSharedBytes));
        CUDA_OK(LaunchKernel(BetweenKernel,
                             {.grid = dim3(static_cast<uint32_t>(multiprocessors)),
                              .block = dim3(256),
                              .shared_bytes = kDecodeSharedBytes,
                              .stream = stream,
                              .dependent = true},
                             BetweenParams{y.get(), y.get()}));
      }
      run(layer[1], 128, y.get(), nullptr, nullptr);
      run(layer[2], 128, nullptr, y2.get(), nullptr);
      run(layer[3], 128, y2.get(), nullptr, nullptr);
    }
    run({chain.vocab, chain.hidden, true, DecodeOutput::kFloat}, 0, nullptr, nullptr, logits.get());
  };
  const GraphTimes times = TimeGraph(stream, 5, 20, step);
  const double us = times.median_us;
  const double bytes = static_cast<double>(layer_bytes) * chain.layers + head_bytes;
  const double tb = bytes / us / 1e6;
  std::printf(
      "%s %s tokens %2d %s: %8.1f us (min %.1f), %.3f TB/s, %.1f %% of 4.65, %.0f tok/s without "
      "attention\n",
      chain.name, TestedName(), tokens, between ? "with a kernel between" : "products alone       ",
      us, times.least_us, tb, tb / 4.65 * 100, tokens * 1e6 / us);
  if (json != nullptr) {
    std::fprintf(json,
                 "{\"chain\": \"%s\", \"activations\": \"%s\", \"tokens\": %d, \"between\": %s, "
                 "\"us\": %.2f, "
                 "\"bytes\": %.0f}\n",
                 chain.name, TestedName(), tokens, between ? "true" : "false", us, bytes);
  }
  cudaStreamDestroy(stream);
}

// Shapes, blocks and outputs by chance, the same in every run.
bool CheckRandom(int cases) {
  std::mt19937 random(7);
  const auto up_to = [&](int most) { return 1 + static_cast<int>(random() % most); };
  bool ok = true;
  for (int i = 0; i < cases; ++i) {
    const int group = std::vector{0, 32, 64, 128}[random() % 4];
    const bool silu = random() % 4 == 0;
    const int unit = group == 0 ? 8 : group;
    const Case c{silu ? 16 * up_to(40) : up_to(640),
                 unit * up_to(random() % 2 == 0 ? 1024 / unit : 9000 / unit),
                 group,
                 up_to(16),
                 random() % 2 == 0,
                 silu ? DecodeOutput::kSiluMul
                      : std::vector{DecodeOutput::kHalf, DecodeOutput::kFloat,
                                    DecodeOutput::kAddResidual}[random() % 3],
                 random() % 2 == 0};
    ok = Check(c, up_to(12)) && ok;
  }
  return ok;
}

bool CheckAll(int sm) {
  bool ok = CheckRandom(80);
  int count = 0;
  for (const int tokens : {1, 2, 3, 4, 5, 8, 9, 13, 16}) {
    for (Case c : {Case{2560, 4096, 128, tokens, true, DecodeOutput::kHalf},
                   Case{1024, 14336, 128, tokens, false, DecodeOutput::kAddResidual},
                   Case{3168, 4096, 128, tokens, true, DecodeOutput::kSiluMul},
                   Case{960, 576, 64, tokens, true, DecodeOutput::kFloat},
                   Case{576, 1536, 32, tokens, false, DecodeOutput::kAddResidual},
                   Case{300, 4096, 0, tokens, true, DecodeOutput::kFloat},
                   Case{37, 128, 128, tokens, false, DecodeOutput::kHalf}}) {
      c.fragments = ++count % 2 == 0;
      ok = Check(c, sm) && ok;
    }
    // Few blocks, so that each has several units of row tiles.
    for (Case c : {Case{984, 4736, 128, tokens, false, DecodeOutput::kAddResidual},
                   Case{520, 8192, 128, tokens, true, DecodeOutput::kHalf},
                   Case{400, 11008, 128, tokens, false, DecodeOutput::kAddResidual},
                   Case{1008, 4352, 64, tokens, true, DecodeOutput::kSiluMul},
                   Case{504, 4224, 32, tokens, true, DecodeOutput::kHalf}}) {
      c.fragments = ++count % 2 == 0;
      ok = Check(c, 8) && ok;
    }
  }
  return ok;
}

}  // namespace
}  // namespace nibble::cuda

int main(int argc, char** argv) {
  using namespace nibble::cuda;
  cudaDeviceProp properties;
  CUDA_OK(cudaGetDeviceProperties(&properties, 0));
  const int sm = properties.multiProcessorCount;
  std::printf("%s, %d multiprocessors\n", properties.name, sm);
  bool ok = true;
  for (const Element element : {Element::kHalf, Element::kBfloat16}) {
    Tested() = element;
    ok = CheckAll(sm) && ok;
  }
  FILE* json = argc > 1 ? std::fopen(argv[1], "w") : nullptr;
  const Chain mistral{"mistral-7b", 4096, 14336, 6144, 32, 32000};
  for (const Element element : {Element::kBfloat16, Element::kHalf}) {
    Tested() = element;
    for (const int tokens : {1, 8, 16}) {
      for (const bool between : {false, true}) Time(mistral, tokens, between, sm, json);
    }
  }
  const Chain llama{"llama-3-70b, 8 layers", 8192, 28672, 10240, 8, 128256};
  for (const int tokens : {1, 8, 16}) Time(llama, tokens, false, sm, json);
  if (json != nullptr) std::fclose(json);
  std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
  return ok ? 0 : 1;
}
