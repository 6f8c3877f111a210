// Kernels on the shapes of SmolLM2-135M (group 64) and Mistral-7B (group 128), one or two threads
// that share the rows. Counters: GB/s of weights (or KV cache) read, GMAC/s.
//
//   kernels_bench --benchmark_filter='W4Int8/avx512.*tokens:1/' --benchmark_repetitions=9
#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/pack.h"
#include "tests/bench/kernels_bench_data.h"

namespace nibble::cpu {

void RegisterForwardPasses();  // model_bench.cc

namespace {

BlockRange Share(const benchmark::State& state, int32_t rows) {
  const int32_t blocks = layout::RowBlocks(rows);
  return {blocks * state.thread_index() / state.threads(),
          blocks * (state.thread_index() + 1) / state.threads()};
}

void Count(benchmark::State& state, double bytes, double macs) {
  const double share = static_cast<double>(state.iterations()) / state.threads();
  state.counters["GB/s"] = benchmark::Counter(bytes * share * 1e-9, benchmark::Counter::kIsRate);
  state.counters["GMAC/s"] = benchmark::Counter(macs * share * 1e-9, benchmark::Counter::kIsRate);
}

struct Shape {
  int32_t rows, columns, group;
  std::string Name() const {
    return std::to_string(rows) + "x" + std::to_string(columns) + "g" + std::to_string(group);
  }
};

// Threads of one benchmark share its operands: made by the caller of RegisterBenchmark, on first
// use, since all of them together would not fit a small machine.
template <class T>
class Lazy {
 public:
  template <class Make>
  std::shared_ptr<T> Get(const Make& make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<T> value = value_.lock();
    if (value == nullptr) value_ = value = make();
    return value;
  }

 private:
  std::mutex mutex_;
  std::weak_ptr<T> value_;
};

// ---- Floors ----------------------------------------------------------------------------------

// Reading memory once, 8 bytes at a time in eight sums: what decode cannot be faster than.
void ReadBandwidth(benchmark::State& state, const std::shared_ptr<Lazy<Buffer<uint64_t>>>& lazy) {
  const int64_t count = state.range(0) * (1 << 20) / 8;
  const auto buffer = lazy->Get([&] { return std::make_shared<Buffer<uint64_t>>(count); });
  const int64_t part = count / state.threads() / 64 * 64;
  const uint64_t* data = buffer->data() + part * state.thread_index();
  for (auto _ : state) {
    std::array<uint64_t, 64> sums = {};
    for (int64_t i = 0; i < part; i += 64) {
      for (size_t j = 0; j < 64; ++j) sums[j] += data[i + static_cast<int64_t>(j)];
    }
    benchmark::DoNotOptimize(sums);
  }
  Count(state, static_cast<double>(count) * 8, 0);
}

// ---- Products --------------------------------------------------------------------------------

struct W4Operands {
  W4Operands(const Shape& shape, int32_t tokens, int32_t terms)
      : w(shape.rows, shape.columns, shape.group),
        x(tokens, shape.columns, shape.group, terms),
        y(static_cast<int64_t>(tokens) * shape.rows) {}
  W4 w;
  Activations x;
  Buffer<float> y;
};

// `terms` of the activations; 0 = fp32.
void W4Product(benchmark::State& state, IsaLevel level, const Shape& shape, int32_t terms,
               const std::shared_ptr<Lazy<W4Operands>>& lazy) {
  const int32_t tokens = static_cast<int32_t>(state.range(0));
  const auto operands =
      lazy->Get([&] { return std::make_shared<W4Operands>(shape, tokens, std::max(terms, 1)); });
  const Kernels& kernels = GetKernels(level);
  const GemmOutput y = {operands->y.data(), shape.rows, nullptr};
  const BlockRange blocks = Share(state, shape.rows);
  for (auto _ : state) {
    if (terms == 0) {
      kernels.gemm_w4_float(operands->w.matrix, operands->x.floats, y, blocks);
    } else {
      kernels.gemm_w4_int8(operands->w.matrix, operands->x.ints, y, blocks);
    }
  }
  Count(state, operands->w.bytes(), static_cast<double>(shape.rows) * shape.columns * tokens);
}

// The head: 49152 x 576 as int8 or fp16.
struct HeadOperands {
  HeadOperands(int32_t rows, int32_t columns, int32_t tokens, bool int8)
      : values(layout::Int8Bytes(rows, columns) * (int8 ? 1 : 2)),
        scales(Floats(layout::GroupEntries(rows, columns, layout::kInt8Group), 0.01F)),
        x(tokens, columns, layout::kInt8Group),
        y(static_cast<int64_t>(tokens) * rows) {
    if (!int8) std::memset(values.data(), 0x2c, static_cast<size_t>(rows) * columns * 2);
  }
  Buffer<uint8_t> values;
  Buffer<float> scales;
  Activations x;
  Buffer<float> y;
};

void HeadProduct(benchmark::State& state, IsaLevel level, bool int8,
                 const std::shared_ptr<Lazy<HeadOperands>>& lazy) {
  constexpr int32_t kRows = 49152;
  constexpr int32_t kColumns = 576;
  const int32_t tokens = static_cast<int32_t>(state.range(0));
  const auto operands =
      lazy->Get([&] { return std::make_shared<HeadOperands>(kRows, kColumns, tokens, int8); });
  const Kernels& kernels = GetKernels(level);
  const Int8Matrix narrow = {kRows, kColumns, operands->values.data(), operands->scales.data()};
  const DenseMatrix wide = {kRows, kColumns, operands->values.data(), ElementType::kF16};
  const GemmOutput y = {operands->y.data(), kRows, nullptr};
  for (auto _ : state) {
    if (int8) {
      kernels.gemm_int8(narrow, operands->x.ints, y, Share(state, kRows));
    } else {
      kernels.gemm_dense(wide, operands->x.floats, y, Share(state, kRows));
    }
  }
  const double elements = static_cast<double>(kRows) * kColumns;
  Count(state, elements * (int8 ? 1.125 : 2.0), elements * tokens);
}

// ---- Attention -------------------------------------------------------------------------------

// Tokens at the end of `positions`, heads as SmolLM2 has them (9 over 3, head_dim 64).
struct AttentionOperands {
  explicit AttentionOperands(int32_t positions)
      : keys(positions * kWidth),
        values(positions * kWidth),
        q(Floats(positions * 576L)),
        out(positions * 576L) {
    for (int32_t b = 0; b < positions / 16; ++b) table.push_back(b);
    const Buffer<float> row = Floats(kWidth);
    const KvCache cache = {keys.data(), values.data(), ElementType::kF16, 3, 64};
    for (int32_t p = 0; p < positions; ++p) {
      GetKernels(IsaLevel::kReference)
          .write_kv(cache, const_cast<Buffer<float>&>(row).data(),
                    const_cast<Buffer<float>&>(row).data(), p / 16, p % 16);
    }
  }
  static constexpr int64_t kWidth = 3 * 64;
  Buffer<uint16_t> keys, values;
  Buffer<float> q, out;
  std::vector<int32_t> table;
};

void AttentionRows(benchmark::State& state, IsaLevel level) {
  const int32_t positions = static_cast<int32_t>(state.range(0));
  const int32_t tokens = static_cast<int32_t>(state.range(1));
  AttentionOperands operands(positions);
  const AttentionArgs args = {
      .q = operands.q.data(),
      .q_stride = 576,
      .out = operands.out.data(),
      .out_stride = 576,
      .cache = {operands.keys.data(), operands.values.data(), ElementType::kF16, 3, 64},
      .block_table = operands.table.data(),
      .first_position = positions - tokens,
      .window = 0,
      .heads = 9,
      .scale = 0.125F};
  const Kernels& kernels = GetKernels(level);
  for (auto _ : state) kernels.attention(args, 0, tokens, 0, 9);
  const double seen = (static_cast<double>(positions) - (tokens - 1) / 2.0) * tokens;
  Count(state, positions * 192.0 * 2 * 2, seen * 576 * 2);
}

// ---- Elementwise -----------------------------------------------------------------------------

void Elementwise(benchmark::State& state, IsaLevel level, const std::string& op) {
  constexpr int32_t kColumns = 1536;
  const int32_t tokens = static_cast<int32_t>(state.range(0));
  const Kernels& kernels = GetKernels(level);
  Activations x(tokens, kColumns, 64);
  Buffer<float> in = Floats(2L * tokens * kColumns);
  Buffer<float> out(2L * tokens * kColumns);
  Buffer<float> weight = Floats(kColumns);
  std::vector<float> ones(128, 1.0F);
  std::vector<float> zeros(128, 0.0F);
  for (auto _ : state) {
    if (op == "quantize") {
      kernels.quantize(x.floats, {64, 1, x.values.data(), x.scales.data(), x.sums.data()});
    } else if (op == "group_sums") {
      kernels.group_sums(x.floats, 64, x.group_sums.data());
    } else if (op == "rms_norm") {
      kernels.rms_norm(x.floats, weight.data(), 1e-5F, out.data(), kColumns);
    } else if (op == "silu_mul") {
      kernels.silu_mul(in.data(), tokens, kColumns, out.data());
    } else if (op == "rope") {
      for (int32_t t = 0; t < tokens; ++t) {
        // Cosine 1 and sine 0: repeated rotation must not drift into denormals.
        kernels.rope(in.data() + t * kColumns, kColumns / 64, 64, {ones.data(), zeros.data()}, 3);
      }
    } else {
      kernels.add(in.data(), x.x.data(), static_cast<int64_t>(tokens) * kColumns);
    }
    benchmark::ClobberMemory();
  }
  state.counters["Gelem/s"] =
      benchmark::Counter(static_cast<double>(state.iterations()) * tokens * kColumns * 1e-9,
                         benchmark::Counter::kIsRate);
}

// ---- Registration ----------------------------------------------------------------------------

void RegisterProducts(IsaLevel level, const std::string& name) {
  const std::vector<Shape> shapes = {{960, 576, 64},    {576, 576, 64},    {3072, 576, 64},
                                     {576, 1536, 64},   {6144, 4096, 128}, {28672, 4096, 128},
                                     {4096, 14336, 128}};
  const char* const names[] = {"W4Float/", "W4Int8/", "W4Int8TwoTerms/"};
  for (const int terms : {1, 2, 0}) {
    for (const Shape& shape : shapes) {
      for (const int tokens : {1, 2, 4, 8, 16, 64, 512}) {
        if (shape.rows > 3072 && tokens > 64) continue;
        const auto lazy = std::make_shared<Lazy<W4Operands>>();
        benchmark::RegisterBenchmark((names[terms] + name + "/" + shape.Name()).c_str(), W4Product,
                                     level, shape, terms, lazy)
            ->ArgName("tokens")
            ->Arg(tokens)
            ->ThreadRange(1, 2)
            ->UseRealTime();
      }
    }
  }
  for (const bool int8 : {true, false}) {
    for (const int tokens : {1, 4, 16}) {
      benchmark::RegisterBenchmark(((int8 ? "HeadInt8/" : "HeadF16/") + name).c_str(), HeadProduct,
                                   level, int8, std::make_shared<Lazy<HeadOperands>>())
          ->ArgName("tokens")
          ->Arg(tokens)
          ->ThreadRange(1, 2)
          ->UseRealTime();
    }
  }
}

void RegisterAll() {
  for (const int megabytes : {1, 28, 85, 1024}) {
    benchmark::RegisterBenchmark("ReadBandwidth", ReadBandwidth,
                                 std::make_shared<Lazy<Buffer<uint64_t>>>())
        ->ArgName("MiB")
        ->Arg(megabytes)
        ->ThreadRange(1, 2)
        ->UseRealTime();
  }
  for (const IsaLevel level : {IsaLevel::kAvx2, IsaLevel::kAvx512Vnni, IsaLevel::kAmx}) {
    if (!IsaLevelSupported(level)) continue;
    const std::string name(IsaLevelName(level));
    RegisterProducts(level, name);
    benchmark::RegisterBenchmark(("Attention/" + name).c_str(), AttentionRows, level)
        ->ArgNames({"positions", "tokens"})
        ->ArgsProduct({{128, 512, 2048}, {1, 128}})
        ->Args({512, 512});
    for (const char* op : {"quantize", "group_sums", "rms_norm", "silu_mul", "rope", "add"}) {
      benchmark::RegisterBenchmark((std::string("Elementwise/") + name + "/" + op).c_str(),
                                   Elementwise, level, op)
          ->ArgName("tokens")
          ->Arg(1)
          ->Arg(64);
    }
  }
}

}  // namespace
}  // namespace nibble::cpu

int main(int argc, char** argv) {
  nibble::cpu::RegisterAll();
  nibble::cpu::RegisterForwardPasses();
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
