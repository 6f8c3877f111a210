// All kernels of a whole forward pass in the order and on the shapes of SmolLM2-135M (30 layers,
// hidden 576, 9 query and 3 KV heads, FFN 1536, group 64, int8 head of 49152 rows), threads in
// step by a spinning barrier. No engine, no model file: what the kernels alone can reach.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "tests/bench/kernels_bench_data.h"

namespace nibble::cpu {
namespace {

constexpr int32_t kLayers = 30;
constexpr int32_t kHidden = 576;
constexpr int32_t kHeads = 9;
constexpr int32_t kKvHeads = 3;
constexpr int32_t kHeadDim = 64;
constexpr int32_t kKvWidth = kKvHeads * kHeadDim;
constexpr int32_t kQkv = kHidden + 2 * kKvWidth;
constexpr int32_t kFfn = 1536;
constexpr int32_t kVocabulary = 49152;
constexpr int32_t kGroup = 64;
constexpr int32_t kChunk = 32;  // tokens of attention that a thread takes at a time

struct Layer {
  W4 qkv{kQkv, kHidden, kGroup};
  W4 o{kHidden, kHidden, kGroup};
  W4 gate_up{2 * kFfn, kHidden, kGroup};
  W4 down{kHidden, kFfn, kGroup};
};

// Quantized activations of one width.
struct Quantized {
  Quantized(int32_t tokens, int32_t columns, int32_t group)
      : values(static_cast<int64_t>(tokens) * columns),
        scales(static_cast<int64_t>(tokens) * columns / group),
        sums(static_cast<int64_t>(tokens) * columns / group),
        view{.tokens = tokens,
             .columns = columns,
             .group = group,
             .values = values.data(),
             .scales = scales.data(),
             .sums = sums.data()} {}
  Buffer<int8_t> values;
  Buffer<float> scales;
  Buffer<int32_t> sums;
  Int8Activations view;
};

class SpinBarrier {
 public:
  explicit SpinBarrier(int threads) : threads_(threads) {}
  void Wait() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    while (round_.load(std::memory_order_acquire) == round) __builtin_ia32_pause();
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<int> round_{0};
};

class Model {
 public:
  // `tokens` of one sequence that ends at position `positions`.
  Model(IsaLevel level, int32_t tokens, int32_t positions, int threads)
      : kernels_(GetKernels(level)),
        tokens_(tokens),
        positions_(positions),
        threads_(threads),
        barrier_(threads),
        layers_(kLayers),
        head_values_(layout::Int8Bytes(kVocabulary, kHidden)),
        head_scales_(Floats(layout::GroupEntries(kVocabulary, kHidden, 32), 0.01F)),
        norm_(Floats(kHidden)),
        cos_(static_cast<size_t>(positions) * kHeadDim, 1.0F),
        sin_(static_cast<size_t>(positions) * kHeadDim, 0.0F),
        keys_(Halves()),
        values_(Halves()),
        residual_(Floats(int64_t{tokens} * kHidden)),
        normed_(int64_t{tokens} * kHidden),
        qkv_(int64_t{tokens} * kQkv),
        attended_(int64_t{tokens} * kHidden),
        projected_(int64_t{tokens} * kHidden),
        gate_up_(int64_t{tokens} * 2 * kFfn),
        activated_(int64_t{tokens} * kFfn),
        logits_(kVocabulary),
        hidden_q_(tokens, kHidden, kGroup),
        ffn_q_(tokens, kFfn, kGroup),
        head_q_(1, kHidden, 32) {
    for (int32_t b = 0; b < (positions + 15) / 16; ++b) table_.push_back(b);
  }

  // Runs on every thread.
  void Forward(int thread) {
    for (const Layer& layer : layers_) {
      Norm(thread);
      Product(layer.qkv, hidden_q_, qkv_, thread);
      RopeAndWrite(thread);
      Attend(thread);
      QuantizeRows(attended_, hidden_q_, thread);
      barrier_.Wait();
      Product(layer.o, hidden_q_, projected_, thread);
      Norm(thread);
      Product(layer.gate_up, hidden_q_, gate_up_, thread);
      const int32_t from = First(thread);
      kernels_.silu_mul(gate_up_.data() + int64_t{from} * 2 * kFfn, First(thread + 1) - from, kFfn,
                        activated_.data() + int64_t{from} * kFfn);
      QuantizeRows(activated_, ffn_q_, thread);
      barrier_.Wait();
      Product(layer.down, ffn_q_, projected_, thread);
    }
    if (thread == 0) {
      kernels_.quantize({1, kHidden, residual_.data() + int64_t{tokens_ - 1} * kHidden, kHidden},
                        {32, 1, head_q_.values.data(), head_q_.scales.data(), head_q_.sums.data()});
    }
    barrier_.Wait();
    kernels_.gemm_int8({kVocabulary, kHidden, head_values_.data(), head_scales_.data()},
                       head_q_.view, {logits_.data(), kVocabulary, nullptr},
                       Share(kVocabulary / 16, thread));
    barrier_.Wait();
  }

 private:
  Buffer<uint16_t> Halves() const {
    Buffer<uint16_t> halves(int64_t{(positions_ + 15) / 16 * 16} * kKvWidth);
    for (int64_t i = 0; i < int64_t{positions_} * kKvWidth; ++i) {
      halves.data()[i] = static_cast<uint16_t>(0x3000 + i % 977);
    }
    return halves;
  }
  BlockRange Share(int32_t count, int thread) const {
    return {count * thread / threads_, count * (thread + 1) / threads_};
  }
  int32_t First(int thread) const { return tokens_ * thread / threads_; }

  void QuantizeRows(Buffer<float>& x, Quantized& to, int thread) {
    const int64_t from = First(thread);
    const int64_t columns = to.view.columns;
    kernels_.quantize(
        {First(thread + 1) - First(thread), to.view.columns, x.data() + from * columns, columns},
        {to.view.group, 1, to.values.data() + from * columns,
         to.scales.data() + from * columns / to.view.group,
         to.sums.data() + from * columns / to.view.group});
  }
  // Residual add, norm and quantization of a thread's tokens.
  void Norm(int thread) {
    const int64_t from = First(thread);
    const int32_t count = First(thread + 1) - First(thread);
    float* rows = residual_.data() + from * kHidden;
    // Zero times the projection, so that many passes do not drift to infinity.
    kernels_.add(rows, projected_.data() + from * kHidden, 0);
    kernels_.rms_norm({count, kHidden, rows, kHidden}, norm_.data(), 1e-5F,
                      normed_.data() + from * kHidden, kHidden);
    QuantizeRows(normed_, hidden_q_, thread);
    barrier_.Wait();
  }
  void Product(const W4& w, const Quantized& x, Buffer<float>& y, int thread) {
    kernels_.gemm_w4_int8(w.matrix, x.view, {y.data(), w.matrix.rows, nullptr},
                          Share(layout::RowBlocks(w.matrix.rows), thread));
    barrier_.Wait();
  }
  void RopeAndWrite(int thread) {
    const KvCache cache = {keys_.data(), values_.data(), ElementType::kF16, kKvHeads, kHeadDim};
    for (int64_t t = First(thread); t < First(thread + 1); ++t) {
      const int32_t position = positions_ - tokens_ + static_cast<int32_t>(t);
      float* row = qkv_.data() + t * kQkv;
      kernels_.rope(row, kHeads + kKvHeads, kHeadDim, {cos_.data(), sin_.data()}, position);
      kernels_.write_kv(cache, row + kHidden, row + kHidden + kKvWidth, position / 16,
                        position % 16);
    }
    barrier_.Wait();
  }
  void Attend(int thread) {
    const AttentionArgs args = {
        .q = qkv_.data(),
        .q_stride = kQkv,
        .out = attended_.data(),
        .out_stride = kHidden,
        .cache = {keys_.data(), values_.data(), ElementType::kF16, kKvHeads, kHeadDim},
        .block_table = table_.data(),
        .first_position = positions_ - tokens_,
        .window = 0,
        .heads = kHeads,
        .scale = 0.125F};
    if (tokens_ == 1) {
      const BlockRange heads = Share(kHeads, thread);
      kernels_.attention(args, 0, 1, heads.begin, heads.end);
    } else {
      for (int32_t t = thread * kChunk; t < tokens_; t += threads_ * kChunk) {
        kernels_.attention(args, t, std::min(t + kChunk, tokens_), 0, kHeads);
      }
    }
    barrier_.Wait();
  }

  const Kernels& kernels_;
  const int32_t tokens_;
  const int32_t positions_;
  const int threads_;
  SpinBarrier barrier_;
  std::vector<Layer> layers_;
  Buffer<uint8_t> head_values_;
  Buffer<float> head_scales_;
  Buffer<float> norm_;
  std::vector<float> cos_, sin_;
  Buffer<uint16_t> keys_, values_;  // one layer's, used by all
  Buffer<float> residual_, normed_, qkv_, attended_, projected_, gate_up_, activated_, logits_;
  Quantized hidden_q_, ffn_q_, head_q_;
  std::vector<int32_t> table_;
};

// The fastest of the passes is what the machine can do: others may use it at the same time.
void ForwardPass(benchmark::State& state, IsaLevel level) {
  const int32_t tokens = static_cast<int32_t>(state.range(0));
  const int32_t positions = static_cast<int32_t>(state.range(1));
  const int threads = static_cast<int>(state.range(2));
  Model model(level, tokens, positions, threads);
  std::atomic<bool> stop{false};
  SpinBarrier start(threads);
  std::vector<std::jthread> helpers;
  for (int thread = 1; thread < threads; ++thread) {
    helpers.emplace_back([&, thread] {
      for (start.Wait(); !stop.load(); start.Wait()) model.Forward(thread);
    });
  }
  double best = 1e9;
  for (auto _ : state) {
    const auto begin = std::chrono::steady_clock::now();
    start.Wait();
    model.Forward(0);
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    best = std::min(best, seconds);
  }
  stop.store(true);
  start.Wait();
  state.counters["best_tok/s"] = tokens / best;
}

}  // namespace

void RegisterForwardPasses() {
  for (const IsaLevel level : {IsaLevel::kAvx2, IsaLevel::kAvx512Vnni, IsaLevel::kAmx}) {
    if (!IsaLevelSupported(level)) continue;
    auto* bench = benchmark::RegisterBenchmark(
        ("Forward/" + std::string(IsaLevelName(level))).c_str(), ForwardPass, level);
    bench->ArgNames({"tokens", "positions", "threads"})->UseRealTime();
    for (const int threads : {1, 2}) {
      bench->Args({1, 128, threads})->Args({1, 1024, threads})->Args({512, 512, threads});
    }
  }
}

}  // namespace nibble::cpu
