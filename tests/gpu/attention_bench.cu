// Times attention by shape on one GPU, in graphs over caches larger than the L2.
//
//   attention_bench [decode | prompt | BATCH CONTEXT BLOCKS PARTS]
//
// Decode: kernels as in a step, each behind a kernel that reads as many bytes as a matrix product
// of the step; what is shown is what attention adds to that chain. Prompts: kernels back to back.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels/cuda/attention_layout.h"
#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"
#include "tests/gpu/device_array.h"
#include "tests/gpu/graph_timer.h"

namespace nibble::cuda {
namespace {

constexpr int32_t kHeads = 32, kKvHeads = 8, kHeadDim = 128;  // Mistral-7B
constexpr int64_t kRowBytes = (kHeads + 2 * kKvHeads) * kHeadDim * 2;
constexpr int64_t kTokenBytes = 2 * kKvHeads * kHeadDim * 2;  // keys and values
constexpr int64_t kCacheBytes = int64_t{1} << 30;
constexpr int64_t kProductBytes = 13 << 20;
constexpr int32_t kLayersMax = 24;
constexpr int32_t kRepeats = 7;
constexpr double kReadRate = 4.65e12;

struct ReadParams {
  const uint4* from = nullptr;
  int64_t count = 0;
  uint4* to = nullptr;
};

// Stands for a matrix product: one block a multiprocessor, the shared memory of half of one.
__global__ void __launch_bounds__(256, 2) ReadKernel(const __grid_constant__ ReadParams p) {
  LetNextKernelStart();
  WaitForPreviousKernel();
  uint4 sum = {};
#pragma unroll 8
  for (int64_t i = blockIdx.x * 256 + threadIdx.x; i < p.count; i += gridDim.x * 256) {
    const uint4 value = __ldcs(p.from + i);
    sum.x ^= value.x ^ value.y ^ value.z ^ value.w;
  }
  if (sum.x == 0x12345678u) *p.to = sum;
}

class Bench {
 public:
  Bench() : cache_(kCacheBytes), weights_(kCacheBytes), q_(int64_t{8192} * kRowBytes) {
    CUDA_OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    Fill(cache_, 1);
    Fill(weights_, 2);
    Fill(q_, 3);
    CUDA_OK(cudaStreamSynchronize(stream_));
    CUDA_OK(cudaFuncSetAttribute(ReadKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kDecodeSharedBytes));
  }

  // `parts` of every sequence; 0 as planned. Without a sequence: what a kernel costs that does
  // nothing.
  void Decode(int32_t batch, int32_t context, int32_t blocks, int32_t parts = 0) {
    std::vector<AttentionTile> tiles;
    for (int32_t i = 0; i < batch; ++i) tiles.push_back({i, 1, context - 1, i});
    std::vector<AttentionUnit> plan;
    if (parts == 0) {
      PlanAttention(tiles, {.kv_heads = kKvHeads, .blocks = blocks}, &plan);
    } else {
      plan = InParts(tiles, parts);
    }
    parts = 1;
    for (const AttentionUnit& unit : plan) parts = std::max<int32_t>(parts, unit.parts);
    if (plan.empty()) plan.resize(1);
    const DeviceArray<AttentionUnit> units(plan);
    const int32_t table = (context + 15) / 16;
    const int32_t layers = Layers(int64_t{std::max(1, batch)} * table * 16);
    AttentionParams params = Params(std::max(1, batch), table);
    params.units = units.get();
    params.unit_count = static_cast<int32_t>(plan.size());
    params.blocks = blocks;
    const DeviceArray<float> angles(std::vector<float>(static_cast<size_t>(context) * 64, 0.5f));
    params.rotation = {.cos = angles.get(), .sin = angles.get()};
    const double with = Time([&] { Chain(params, layers, true, true); }) / layers;
    const double without = Time([&] { Chain(params, layers, false, true); }) / layers;
    const double alone = Time([&] { Chain(params, layers, true, false); }) / layers;
    const double floor = static_cast<double>(batch) * context * kTokenBytes / kReadRate * 1e6;
    std::printf(
        "decode %4d x %6d in %d: units %4zu parts %2d  adds %7.2f us, alone %7.2f, floor "
        "%6.2f us, %3.0f %%\n",
        batch, context, blocks, plan.size(), parts, with - without, alone, floor,
        100 * floor / (with - without));
    std::fflush(stdout);
  }

  void Prompt(int32_t tokens, int32_t prefix) {
    const int32_t step = AttentionPromptTokens(kHeads, kKvHeads);
    std::vector<AttentionTile> host;
    for (int32_t t = 0; t < tokens; t += step) {
      host.insert(host.begin(), {t, std::min(step, tokens - t), prefix + t, 0});
    }
    const DeviceArray<AttentionTile> tiles(host);
    const int32_t table = (prefix + tokens + 15) / 16;
    AttentionParams params = Params(1, table);
    params.tiles = tiles.get();
    params.tile_count = static_cast<int32_t>(host.size());
    const int32_t layers = std::min(4, Layers(int64_t{table} * 16));
    const double us = Time([&] { Chain(params, layers, true, false); }) / layers;
    const double keys = (static_cast<double>(prefix) + (tokens + 1) / 2.0) * tokens;
    std::printf("prompt %5d after %5d: %8.1f us, %4.0f TFLOP/s\n", tokens, prefix, us,
                4.0 * kHeads * kHeadDim * keys / us * 1e-6);
    std::fflush(stdout);
  }

 private:
  static std::vector<AttentionUnit> InParts(const std::vector<AttentionTile>& tiles,
                                            int32_t parts) {
    std::vector<AttentionUnit> units;
    for (const AttentionTile& tile : tiles) {
      const int32_t count = tile.first_position / kKvBlockTokens + 1;
      for (int32_t part = 0; part < parts; ++part) {
        units.push_back({.first_row = tile.first_row,
                         .first_position = tile.first_position,
                         .slot = tile.slot,
                         .tokens = 1,
                         .parts = static_cast<int16_t>(parts),
                         .begin_block = count * part / parts,
                         .end_block = count * (part + 1) / parts,
                         .place = tile.first_row * parts,
                         .part = part});
      }
    }
    return units;
  }
  void Fill(const DeviceArray<uint8_t>& memory, uint32_t seed) {
    CUDA_OK(FillRandomReals(reinterpret_cast<Real16*>(memory.get()),
                            static_cast<int64_t>(memory.count() / 2), 0, 1, seed,
                            {.stream = stream_}));
  }
  static int32_t Layers(int64_t tokens) {
    return static_cast<int32_t>(
        std::clamp<int64_t>(kCacheBytes / (tokens * kTokenBytes), 1, kLayersMax));
  }
  // Blocks of a sequence lie anywhere among those of the batch.
  AttentionParams Params(int32_t batch, int32_t table) {
    std::vector<int32_t> tables;
    const int32_t blocks = batch * table;
    for (int32_t i = 0; i < blocks; ++i) {
      tables.push_back(static_cast<int32_t>(int64_t{i} * 7919 % blocks));
    }
    if (blocks % 7919 == 0) std::exit(1);
    tables_.Set(tables);
    layer_halves_ = int64_t{blocks} * kKvBlockTokens * kKvHeads * kHeadDim;
    return {.q = reinterpret_cast<const Real16*>(q_.get()),
            .q_stride = kRowBytes / 2,
            .out = reinterpret_cast<Real16*>(out_.get()),
            .block_tables = tables_.get(),
            .table_size = table,
            .heads = kHeads,
            .kv_heads = kKvHeads,
            .head_dim = kHeadDim,
            .scale = 0.088f,
            .scratch = scratch_.get()};
  }

  void Chain(AttentionParams params, int32_t layers, bool attention, bool products) {
    Real16* cache = reinterpret_cast<Real16*>(cache_.get());
    for (int32_t layer = 0; layer < layers; ++layer) {
      if (products) {
        const ReadParams read{
            .from = reinterpret_cast<const uint4*>(weights_.get() + layer * kProductBytes),
            .count = kProductBytes / 16,
            .to = reinterpret_cast<uint4*>(out_.get())};
        CUDA_OK(LaunchKernel(ReadKernel,
                             {.grid = dim3(kAttentionBlocks),
                              .block = dim3(256),
                              .shared_bytes = kDecodeSharedBytes,
                              .stream = stream_,
                              .dependent = layer > 0},
                             read));
      }
      if (!attention) continue;
      params.cache = {.keys = cache + 2 * layer * layer_halves_,
                      .values = cache + (2 * layer + 1) * layer_halves_};
      CUDA_OK(Attention(params, {.stream = stream_, .dependent = products || layer > 0}));
    }
  }

  // Microseconds of a graph, the median of several.
  template <typename Work>
  double Time(const Work& work) {
    return TimeGraph(stream_, 2, kRepeats, work).median_us;
  }

  cudaStream_t stream_ = nullptr;
  const DeviceArray<uint8_t> cache_, weights_, q_;
  const DeviceArray<uint8_t> out_{size_t{8192} * kHeads * kHeadDim * 2};
  DeviceArray<int32_t> tables_{1 << 20};
  const DeviceArray<float> scratch_{std::vector<float>(
      static_cast<size_t>(AttentionScratchFloats(AttentionPlaces(kKvHeads), kKvHeads, kHeadDim)))};
  int64_t layer_halves_ = 0;
};

}  // namespace
}  // namespace nibble::cuda

int main(int argc, char** argv) {
  using namespace nibble::cuda;
  const bool all = argc < 2;
  Bench bench;
  if (argc > 4) {
    bench.Decode(std::atoi(argv[1]), std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]));
    return 0;
  }
  if (all || std::strcmp(argv[1], "decode") == 0) {
    bench.Decode(0, 16, 132);
    for (const int32_t context : {16, 128, 256, 512, 1024, 2048, 8192, 32768}) {
      bench.Decode(1, context, 132);
    }
    for (const int32_t context : {256, 384, 512, 1024}) {
      for (const int32_t parts : {1, 2, 4, 8, 16}) bench.Decode(1, context, 132, parts);
    }
    for (const int32_t batch : {4, 8, 16}) bench.Decode(batch, 192, 132);
    bench.Decode(16, 2048, 132);
    for (const int32_t batch : {24, 32, 64, 128, 256}) {
      for (const int32_t blocks : {132, 264}) bench.Decode(batch, 192, blocks);
    }
    for (const int32_t blocks : {132, 264}) bench.Decode(64, 2048, blocks);
  }
  if (all || std::strcmp(argv[1], "prompt") == 0) {
    bench.Prompt(512, 0);
    bench.Prompt(2048, 0);
    bench.Prompt(8192, 0);
    bench.Prompt(2048, 6144);
    bench.Prompt(300, 0);
  }
  return 0;
}
