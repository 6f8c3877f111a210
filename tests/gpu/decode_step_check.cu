// Checks the kernel of a whole step's products against the chain of kernels, then times both as
// graphs. Needs a GPU.
//
//   decode_step_check [time] [WINDOW …]
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/w4_decode.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/graph_timer.h"

namespace nibble::cuda {
namespace {

struct Shape {
  const char* name;
  int hidden, ffn, qkv_rows, layers, vocab, group, head_group;
};

struct Matrix {
  int rows, columns, group;
  bool normed;
  DecodeOutput output;
};

// Products that follow one another as in a decoder, o taking what qkv leaves.
class Chain {
 public:
  explicit Chain(const Shape& shape) : shape_(shape) {
    for (int layer = 0; layer < shape.layers; ++layer) {
      Add({shape.qkv_rows, shape.hidden, shape.group, true, DecodeOutput::kHalf});
      Add({shape.hidden, shape.hidden, shape.group, false, DecodeOutput::kAddResidual});
      Add({2 * shape.ffn, shape.hidden, shape.group, true, DecodeOutput::kSiluMul});
      Add({shape.hidden, shape.ffn, shape.group, false, DecodeOutput::kAddResidual});
    }
    Add({shape.vocab, shape.hidden, shape.head_group, true, DecodeOutput::kFloat});
    int64_t bytes = 0, most = 0;
    for (const Matrix& m : matrices_) {
      bytes += W4DecodeBytes(m.rows, m.columns, m.group);
      most = std::max(most, int64_t{m.rows} * m.columns);
    }
    bytes_ = bytes;
    weights_ = std::make_unique<DeviceArray<uint8_t>>(bytes);
    Fill(most);
  }

  [[nodiscard]] int64_t bytes() const { return bytes_; }
  [[nodiscard]] const Shape& shape() const { return shape_; }
  [[nodiscard]] const std::vector<Matrix>& matrices() const { return matrices_; }
  [[nodiscard]] const uint8_t* weights() const { return weights_->get(); }

 private:
  void Add(const Matrix& m) { matrices_.push_back(m); }
  void Fill(int64_t most) {
    DeviceArray<uint8_t> q(most), zeros(most / 32);
    DeviceArray<half> scales(most / 32), dense(most);
    int64_t offset = 0;
    for (const Matrix& m : matrices_) {
      const int64_t count = int64_t{m.rows} * m.columns;
      const auto seed = static_cast<uint32_t>(offset >> 8);
      if (m.group == 0) {
        CUDA_OK(FillRandomHalves(dense.get(), count, 0, 0.02f, seed, nullptr));
      } else {
        CUDA_OK(FillRandomBytes(q.get(), count, seed, nullptr));
        CUDA_OK(FillRandomBytes(zeros.get(), count / m.group, seed + 1, nullptr));
        CUDA_OK(FillRandomHalves(scales.get(), count / m.group, 0.005f, 0.001f, seed + 2, nullptr));
      }
      CUDA_OK(PackW4({.q = q.get(),
                      .zeros = zeros.get(),
                      .scales = scales.get(),
                      .dense = dense.get(),
                      .rows = m.rows,
                      .columns = m.columns,
                      .group = m.group,
                      .pair_rows = m.output == DecodeOutput::kSiluMul,
                      .slabs = weights_->get() + offset},
                     nullptr));
      offset += W4DecodeBytes(m.rows, m.columns, m.group);
    }
    CUDA_OK(cudaDeviceSynchronize());
  }

  const Shape shape_;
  std::vector<Matrix> matrices_;
  int64_t bytes_ = 0;
  std::unique_ptr<DeviceArray<uint8_t>> weights_;
};

// Activations of one way to run the chain.
class Run {
 public:
  Run(const Chain& chain, int tokens, int multiprocessors)
      : tokens_(tokens),
        multiprocessors_(multiprocessors),
        parts_(layout::GpuRowTiles(chain.shape().hidden)),
        residual(size_t(tokens) * chain.shape().hidden),
        squares(size_t(tokens) * parts_),
        scales{DeviceArray<float>(tokens), DeviceArray<float>(tokens)},
        norm(std::vector<half>(chain.shape().hidden, __float2half(1.0f))),
        normed(size_t(tokens) * chain.shape().hidden),
        qkv(size_t(tokens) * chain.shape().qkv_rows),
        mlp(size_t(tokens) * chain.shape().ffn),
        logits(size_t(tokens) * chain.shape().vocab),
        arrivals(std::vector<uint64_t>(16, 0)),
        phases_(chain.matrices().size()) {
    int64_t offset = 0;
    int scale = 0;
    std::vector<StepPhase> phases;
    for (const Matrix& m : chain.matrices()) {
      W4DecodeParams p;
      p.slabs = chain.weights() + offset;
      offset += W4DecodeBytes(m.rows, m.columns, m.group);
      p.rows = m.rows;
      p.columns = m.columns;
      p.group = m.group;
      p.tokens = tokens;
      if (m.normed) {
        p.x = normed.get();
        p.normed = {scales[scale].get(), squares.get(), parts_, 1e-5f, scales[1 - scale].get()};
        scale = 1 - scale;
      } else {
        p.x = m.columns == chain.shape().ffn ? mlp.get() : qkv.get();
      }
      p.output = m.output;
      p.y_half = m.output == DecodeOutput::kSiluMul ? mlp.get() : qkv.get();
      p.y_float = logits.get();
      if (m.output == DecodeOutput::kAddResidual) {
        p.residual_out = residual.get();
        p.next = {normed.get(), norm.get(), scales[scale].get(), squares.get()};
      }
      StepPhase phase;
      phase.product = p;
      phases.push_back(phase);
    }
    phases_host_ = phases;
    phases_.Set(phases);
    step_.phases = phases_.get();
    step_.phase_count = static_cast<int32_t>(phases.size());
    step_.tokens = tokens;
    step_.arrivals = arrivals.get();
  }

  void Reset() {
    std::vector<float> values(residual.count());
    std::vector<half> halves(normed.count());
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = std::sin(static_cast<float>(i % 9973)) * 1.5f;
      halves[i] = __float2half(values[i] * kNormedInputFactor);
    }
    residual.Set(values);
    normed.Set(halves);
    std::vector<float> sums(squares.count(), 1.1f * static_cast<float>(values.size()) /
                                                 static_cast<float>(squares.count()));
    squares.Set(sums);
    for (auto& s : scales) s.Set(std::vector<float>(s.count(), 1.0f));
  }
  void Products(cudaStream_t stream) const {
    for (const StepPhase& phase : phases_host_) {
      CUDA_OK(W4Decode(phase.product, multiprocessors_, stream));
    }
  }
  void Step(int window, cudaStream_t stream) const {
    DecodeStepParams p = step_;
    p.window = window;
    CUDA_OK(DecodeStep(p, multiprocessors_, stream));
  }

 private:
  const int tokens_, multiprocessors_, parts_;

 public:
  DeviceArray<float> residual, squares;
  DeviceArray<float> scales[2];
  DeviceArray<half> norm, normed, qkv, mlp;
  DeviceArray<float> logits;
  DeviceArray<uint64_t> arrivals;

 private:
  DeviceArray<StepPhase> phases_;
  std::vector<StepPhase> phases_host_;
  DecodeStepParams step_;
};

double Difference(const std::vector<float>& want, const std::vector<float>& got) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = static_cast<double>(want[i]) - got[i];
    difference += std::isfinite(d) ? d * d : 1e30;
    norm += static_cast<double>(want[i]) * want[i];
  }
  return std::sqrt(difference / norm);
}

bool Check(const Shape& shape, int tokens, int multiprocessors) {
  const Chain chain(shape);
  Run run(chain, tokens, multiprocessors);
  run.Reset();
  run.Products(nullptr);
  CUDA_OK(cudaDeviceSynchronize());
  const auto residual = run.residual.Get(), logits = run.logits.Get();
  bool ok = true;
  std::vector<float> before;
  double worst = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    run.Reset();
    run.Step(0, nullptr);
    CUDA_OK(cudaDeviceSynchronize());
    const auto got = run.logits.Get();
    worst = std::max({worst, Difference(residual, run.residual.Get()), Difference(logits, got)});
    // Results do not vary.
    if (repeat > 0) ok = ok && got == before;
    before = got;
  }
  const bool same = ok;
  ok = ok && worst < 3e-3;
  std::printf("%-4s %-12s tokens %2d: error %.2e, %s\n", ok ? "ok" : "FAIL", shape.name, tokens,
              worst, same ? "three times the same" : "VARIES");
  return ok;
}

void Time(const Chain& chain, int tokens, int multiprocessors, const std::vector<int>& windows) {
  Run run(chain, tokens, multiprocessors);
  run.Reset();
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  const double floor = static_cast<double>(chain.bytes()) / 4.65e6;
  const GraphTimes products = TimeGraph(stream, 3, 11, [&] { run.Products(stream); });
  std::printf("%s tokens %2d: floor %.0f us, chain %.1f, step by window:", chain.shape().name,
              tokens, floor, products.median_us);
  for (const int window : windows) {
    const GraphTimes step = TimeGraph(stream, 3, 11, [&] { run.Step(window, stream); });
    std::printf(" %d: %.1f", window, step.median_us);
    std::fflush(stdout);
  }
  std::printf("\n");
  CUDA_OK(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace nibble::cuda

int main(int argc, char** argv) {
  using namespace nibble::cuda;
  cudaDeviceProp properties;
  CUDA_OK(cudaGetDeviceProperties(&properties, 0));
  const int sm = properties.multiProcessorCount;
  const bool checks = argc < 2 || std::strcmp(argv[1], "time") != 0;
  bool ok = true;
  for (const int tokens : {1, 2, 3, 5, 8}) {
    if (!checks) break;
    for (const Shape& shape : {Shape{"large", 4096, 14336, 6144, 1, 4000, 128, 0},
                               Shape{"odd", 640, 1408, 960, 2, 1000, 128, 128},
                               Shape{"small", 128, 256, 256, 3, 96, 128, 0}}) {
      ok = Check(shape, tokens, sm) && ok;
    }
  }
  std::vector<int> windows;
  for (int i = checks ? 1 : 2; i < argc; ++i) windows.push_back(std::atoi(argv[i]));
  if (windows.empty()) windows.push_back(0);
  if (ok) {
    const Chain mistral({"mistral-7b", 4096, 14336, 6144, 32, 32000, 128, 0});
    for (const int tokens : {1, 2, 4, 8}) Time(mistral, tokens, sm, windows);
  }
  std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
  return ok ? 0 : 1;
}
