// Checks attention against a plain computation in double, at odd sizes. Needs a GPU.
//
//   attention_check [small]    small: short contexts alone, for compute-sanitizer
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/attention_layout.h"
#include "kernels/cuda/attention_plan.h"
#include "kernels/cuda/attention_portable.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/probe.h"
#include "kernels/layout/gpu_x.h"
#include "tests/gpu/comparison.h"
#include "tests/gpu/device_array.h"
#include "tests/gpu/fixed_numbers.h"

namespace nibble::cuda {
namespace {

struct AttentionCase {
  int32_t heads, kv_heads, head_dim, window;
  int32_t blocks;  // of the kernel that streams; 0: the prompt kernel
  std::vector<std::pair<int32_t, int32_t>> sequences;  // first position, tokens
  bool portable = false;                               // by the kernel for GPUs before Hopper
};

std::vector<AttentionTile> TilesOf(const AttentionCase& c) {
  const int32_t step = c.blocks > 0 ? AttentionTileTokens(c.heads, c.kv_heads)
                                    : AttentionPromptTokens(c.heads, c.kv_heads);
  std::vector<AttentionTile> tiles;
  int32_t row = 0;
  for (size_t slot = 0; slot < c.sequences.size(); ++slot) {
    const auto& [first, tokens] = c.sequences[slot];
    for (int32_t t = 0; t < tokens; t += step) {
      tiles.push_back({row + t, std::min(step, tokens - t), first + t, static_cast<int32_t>(slot)});
    }
    row += tokens;
  }
  return tiles;
}

std::vector<int32_t> Shuffled(int32_t count) {
  std::vector<int32_t> order;
  for (int32_t i = 0; i < count; ++i) order.push_back(i);
  std::shuffle(order.begin(), order.end(), Random());
  return order;
}

// What units need on the device beside their inputs; some empty units follow.
struct UnitMemory {
  UnitMemory(const std::vector<AttentionTile>& tiles, int32_t kv_heads, int32_t head_dim,
             int32_t window, int32_t blocks)
      : units(Plan(tiles, kv_heads, window, blocks)),
        scratch(std::vector<float>(static_cast<size_t>(
            AttentionScratchFloats(AttentionPlaces(kv_heads), kv_heads, head_dim)))) {}

  std::vector<AttentionUnit> Plan(const std::vector<AttentionTile>& tiles, int32_t kv_heads,
                                  int32_t window, int32_t blocks) {
    std::vector<AttentionUnit> plan;
    PlanAttention(tiles, {.kv_heads = kv_heads, .blocks = blocks, .window = window}, &plan);
    for (const AttentionUnit& unit : plan) parts = std::max<int32_t>(parts, unit.parts);
    plan.resize(tiles.size() + kAttentionUnitsExtraMax);
    count = static_cast<int32_t>(plan.size());
    return plan;
  }
  void Use(int32_t blocks, AttentionParams* params) const {
    params->units = units.get();
    params->unit_count = count;
    params->blocks = blocks;
    params->scratch = scratch.get();
  }

  int32_t parts = 1, count = 0;
  const DeviceArray<AttentionUnit> units;
  const DeviceArray<float> scratch;
};

// Keys, values and queries of every sequence, and their places in a scrambled cache.
class AttentionData {
 public:
  explicit AttentionData(const AttentionCase& c) : c_(c) {
    for (const auto& [first, tokens] : c.sequences) {
      rows_ += tokens;
      blocks_ = std::max(blocks_, (first + tokens + 15) / 16);
    }
    const auto slots = static_cast<int32_t>(c.sequences.size());
    tables_ = Shuffled(slots * blocks_);
    q_ = NormalReals(static_cast<size_t>(rows_ * c.heads * c.head_dim), 1);
    const auto cache = static_cast<size_t>(slots * blocks_ * c.kv_heads * 16 * c.head_dim);
    keys_ = NormalReals(cache, 1);
    values_ = NormalReals(cache, 1);
    // Nothing beyond a sequence's end may be looked at.
    const Real16 nan = ToReal(std::nanf(""));
    for (int32_t slot = 0; slot < slots; ++slot) {
      const auto& [first, tokens] = c.sequences[static_cast<size_t>(slot)];
      for (int32_t position = first + tokens; position < blocks_ * 16; ++position) {
        for (int32_t i = 0; i < c.kv_heads * c.head_dim; ++i) {
          const size_t at = At(slot, position, i / c.head_dim, i % c.head_dim);
          keys_[at] = values_[at] = nan;
        }
      }
    }
  }

  [[nodiscard]] std::vector<double> Expected() const {
    std::vector<double> out;
    int32_t row = 0;
    for (size_t slot = 0; slot < c_.sequences.size(); ++slot) {
      const auto& [first, tokens] = c_.sequences[slot];
      for (int32_t t = 0; t < tokens; ++t, ++row) {
        for (int32_t head = 0; head < c_.heads; ++head) {
          AppendRow(static_cast<int32_t>(slot), first + t, row, head, &out);
        }
      }
    }
    return out;
  }

  // Of two runs, which must not differ.
  [[nodiscard]] std::vector<double> OnDevice(int32_t* parts) const {
    const DeviceArray<Real16> q(q_), keys(keys_), values(values_);
    const DeviceArray<Real16> out(q_.size());
    const DeviceArray<int32_t> tables(tables_);
    const std::vector<AttentionTile> host_tiles = TilesOf(c_);
    const DeviceArray<AttentionTile> tiles(host_tiles);
    const UnitMemory units(host_tiles, c_.kv_heads, c_.head_dim, c_.window, std::max(1, c_.blocks));
    *parts = units.parts;
    AttentionParams params{.q = q.get(),
                           .q_stride = int64_t{c_.heads} * c_.head_dim,
                           .out = out.get(),
                           .cache = {.keys = keys.get(), .values = values.get()},
                           .block_tables = tables.get(),
                           .table_size = blocks_,
                           .heads = c_.heads,
                           .kv_heads = c_.kv_heads,
                           .head_dim = c_.head_dim,
                           .window = c_.window,
                           .scale = 1.0f / std::sqrt(static_cast<float>(c_.head_dim))};
    if (c_.blocks > 0) {
      units.Use(c_.blocks, &params);
    } else {
      params.tiles = tiles.get();
      params.tile_count = static_cast<int32_t>(host_tiles.size());
    }
    std::vector<Real16> results[2];
    for (std::vector<Real16>& result : results) {
      CUDA_OK(c_.portable ? AttentionPortable(params, {.element = Tested()})
                          : Attention(params, {.element = Tested()}));
      CUDA_OK(cudaDeviceSynchronize());
      result = out.Get();
    }
    if (std::memcmp(results[0].data(), results[1].data(), results[0].size() * 2) != 0) return {};
    if (!c_.portable && !SameInOrder(params, results[0])) return {};
    if (!c_.portable && !SameInFragments(params, results[0])) return {};
    std::vector<double> doubles;
    for (const Real16 value : results[0]) doubles.push_back(Double(value));
    return doubles;
  }

 private:
  // What is left for the next product: the same numbers, in order.
  [[nodiscard]] bool SameInOrder(AttentionParams params, const std::vector<Real16>& plain) const {
    const int32_t columns = c_.heads * c_.head_dim;
    params.ordered_tokens = layout::GpuOrderedTokens(rows_);
    for (const int32_t group : {32, 64, 128}) {
      if (c_.blocks == 0 && c_.head_dim % group != 0) continue;
      const auto count = static_cast<size_t>(layout::GpuOrderedCount(rows_, columns));
      const DeviceArray<Real16> ordered(count);
      params.ordered = ordered.get();
      params.ordered_group = group;
      CUDA_OK(Attention(params, {.element = Tested()}));
      CUDA_OK(cudaDeviceSynchronize());
      const auto at = [&](int32_t token, int32_t k) {
        return layout::GpuOrderedIndex(token, k, group, params.ordered_tokens);
      };
      if (!SameAt(ordered.Get(), plain, at)) return false;
    }
    return true;
  }
  // The same for the decode product, which takes few tokens.
  [[nodiscard]] bool SameInFragments(AttentionParams params,
                                     const std::vector<Real16>& plain) const {
    if (c_.blocks == 0 || rows_ > 16) return true;
    const int32_t columns = c_.heads * c_.head_dim;
    for (const int32_t group : {32, 64, 128}) {
      const layout::GpuFragmentOrder order = layout::GpuFragments(rows_, group);
      const DeviceArray<Real16> out(static_cast<size_t>(layout::GpuFragmentCount(rows_, columns)));
      params.out = out.get();
      params.fragments = order;
      CUDA_OK(Attention(params, {.element = Tested()}));
      CUDA_OK(cudaDeviceSynchronize());
      const auto at = [&](int32_t token, int32_t k) { return order.Index(token, k, columns); };
      if (!SameAt(out.Get(), plain, at)) return false;
    }
    return true;
  }
  // Whether got[at(token, k)] has the bits of the plain result's [token][k].
  template <typename Place>
  [[nodiscard]] bool SameAt(const std::vector<Real16>& got, const std::vector<Real16>& plain,
                            const Place& at) const {
    const int32_t columns = c_.heads * c_.head_dim;
    for (int32_t token = 0; token < rows_; ++token) {
      for (int32_t k = 0; k < columns; ++k) {
        if (std::memcmp(&got[static_cast<size_t>(at(token, k))],
                        &plain[static_cast<size_t>(token * columns + k)], sizeof(Real16)) != 0) {
          return false;
        }
      }
    }
    return true;
  }
  [[nodiscard]] size_t At(int32_t slot, int32_t position, int32_t kv_head, int32_t i) const {
    const int32_t block = tables_[static_cast<size_t>(slot * blocks_ + position / 16)];
    return static_cast<size_t>((block * c_.kv_heads + kv_head) * 16 * c_.head_dim +
                               KvOffset(position % 16, i, c_.head_dim));
  }
  void AppendRow(int32_t slot, int32_t position, int32_t row, int32_t head,
                 std::vector<double>* out) const {
    const int32_t kv_head = head / (c_.heads / c_.kv_heads);
    const int32_t begin = c_.window > 0 ? std::max(0, position - c_.window + 1) : 0;
    std::vector<double> sums(static_cast<size_t>(c_.head_dim), 0.0);
    std::vector<double> query;
    for (int32_t i = 0; i < c_.head_dim; ++i) {
      query.push_back(Double(q_[static_cast<size_t>((row * c_.heads + head) * c_.head_dim + i)]));
    }
    double sum = 0;
    for (int32_t key = begin; key <= position; ++key) {
      double score = 0;
      for (int32_t i = 0; i < c_.head_dim; ++i) {
        score += query[static_cast<size_t>(i)] * Double(keys_[At(slot, key, kv_head, i)]);
      }
      const double weight = std::exp(score / std::sqrt(static_cast<double>(c_.head_dim)));
      sum += weight;
      for (int32_t i = 0; i < c_.head_dim; ++i) {
        sums[static_cast<size_t>(i)] += weight * Double(values_[At(slot, key, kv_head, i)]);
      }
    }
    for (const double value : sums) out->push_back(value / sum);
  }

  const AttentionCase& c_;
  int32_t rows_ = 0, blocks_ = 0;
  std::vector<int32_t> tables_;
  std::vector<Real16> q_, keys_, values_;
};

bool CheckAttention(const AttentionCase& c) {
  const AttentionData data(c);
  int32_t parts = 1;
  const std::vector<double> got = data.OnDevice(&parts);
  const std::string where = c.blocks == 0 ? "prompt"
                                          : "in " + std::to_string(c.blocks) + " blocks, " +
                                                std::to_string(parts) + " parts";
  return Report(std::string(TestedName()) + (c.portable ? " portable" : "") + " attention " +
                    std::to_string(c.heads) + "/" + std::to_string(c.kv_heads) + " head_dim " +
                    std::to_string(c.head_dim) + " window " + std::to_string(c.window) + " " +
                    where,
                data.Expected(), got, Limit(2e-3));
}

struct RotationCase {
  int32_t heads, kv_heads, head_dim, blocks;
  bool norms;
  std::vector<int32_t> positions;
};

// Inputs of steps of one token a sequence.
struct RotationData {
  explicit RotationData(const RotationCase& c)
      : context(*std::max_element(c.positions.begin(), c.positions.end()) + 1),
        table_size((context + 15) / 16),
        width(static_cast<size_t>((c.heads + 2 * c.kv_heads) * c.head_dim)),
        host_tables(Shuffled(static_cast<int32_t>(c.positions.size()) * table_size)),
        qkv(NormalReals(width * c.positions.size(), 1)),
        keys(
            NormalReals(host_tables.size() * static_cast<size_t>(c.kv_heads * 16 * c.head_dim), 1)),
        values(NormalReals(keys.size(), 1)),
        cos(Normal(static_cast<size_t>(context * c.head_dim / 2), 0.7f)),
        sin(Normal(static_cast<size_t>(context * c.head_dim / 2), 0.7f)),
        norm(NormalReals(static_cast<size_t>(c.head_dim), 1)),
        positions(c.positions),
        tables(host_tables) {}

  const int32_t context, table_size;
  const size_t width;
  const std::vector<int32_t> host_tables;
  const std::vector<Real16> qkv, keys, values;
  const DeviceArray<float> cos, sin;
  const DeviceArray<Real16> norm;
  const DeviceArray<int32_t> positions, tables;
};

// Parts that add up to the numbers exactly.
std::vector<float> PartsOf(const std::vector<Real16>& whole) {
  std::vector<float> parts;
  for (const float share : {0.5f, 0.25f, 0.125f, 0.0625f, 0.0625f}) {
    for (const Real16 value : whole) parts.push_back(ToFloat(value) * share);
  }
  return parts;
}

enum class Rotates : uint8_t { kBefore, kInside, kInsideOfParts, kInsideToFixed };

// Outputs, then keys and values as the step leaves them.
std::vector<double> RunRotation(const RotationCase& c, const RotationData& data, Rotates rotates) {
  const auto count = static_cast<int32_t>(c.positions.size());
  std::vector<AttentionTile> tiles;
  std::vector<int32_t> host_blocks;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t position = c.positions[static_cast<size_t>(i)];
    tiles.push_back({i, 1, position, i});
    host_blocks.push_back(
        data.host_tables[static_cast<size_t>(i * data.table_size + position / 16)]);
  }
  const DeviceArray<int32_t> blocks(host_blocks);
  const bool inside = rotates != Rotates::kBefore, of_parts = rotates == Rotates::kInsideOfParts;
  const std::vector<Real16> nothing(data.qkv.size(), ToReal(NAN));
  const DeviceArray<Real16> q(of_parts ? nothing : data.qkv), k(data.keys), v(data.values);
  const DeviceArray<float> parts(PartsOf(data.qkv));
  const DeviceArray<Real16> out(static_cast<size_t>(count * c.heads * c.head_dim));
  const UnitMemory units(tiles, c.kv_heads, c.head_dim, 0, c.blocks);
  const Real16* weight = c.norms ? data.norm.get() : nullptr;
  AttentionParams params{.q = q.get(),
                         .q_stride = static_cast<int64_t>(data.width),
                         .out = out.get(),
                         .cache = {.keys = k.get(), .values = v.get()},
                         .block_tables = data.tables.get(),
                         .table_size = data.table_size,
                         .heads = c.heads,
                         .kv_heads = c.kv_heads,
                         .head_dim = c.head_dim,
                         .scale = 0.1f};
  units.Use(c.blocks, &params);
  if (inside) {
    params.rotation = {data.cos.get(), data.sin.get(), weight, weight, 1e-6f};
    if (of_parts) {
      params.rotation.parts = parts.get();
      params.rotation.part_count = 5;
      params.rotation.part_stride = static_cast<int64_t>(data.qkv.size());
    }
  } else {
    CUDA_OK(RopeAndStore({.qkv = q.get(),
                          .tokens = count,
                          .heads = c.heads,
                          .kv_heads = c.kv_heads,
                          .head_dim = c.head_dim,
                          .positions = data.positions.get(),
                          .blocks = blocks.get(),
                          .cos = data.cos.get(),
                          .sin = data.sin.get(),
                          .q_norm = weight,
                          .k_norm = weight,
                          .epsilon = 1e-6f,
                          .cache = params.cache},
                         {.element = Tested()}));
  }
  const int32_t columns = c.heads * c.head_dim;
  const DeviceArray<Real16> ordered(static_cast<size_t>(layout::GpuOrderedCount(count, columns)));
  const DeviceArray<float> scales(static_cast<size_t>(layout::GpuFixedScaleCount(count, columns)));
  if (rotates == Rotates::kInsideToFixed) {
    params.ordered = ordered.get();
    params.ordered_scales = scales.get();
    params.ordered_tokens = layout::GpuOrderedTokens(count);
  }
  CUDA_OK(Attention(params, {.element = Tested()}));
  CUDA_OK(cudaDeviceSynchronize());
  std::vector<double> result;
  if (rotates == Rotates::kInsideToFixed) {
    const FixedNumbers numbers(ordered.Get(), scales.Get(), count, columns);
    result = numbers.values;
    if (!Report("  sums beside it", numbers.sums_of_values, numbers.sums, 1e-5)) return {};
  } else {
    for (const Real16 value : out.Get()) result.push_back(Double(value));
  }
  for (const auto* array : {&k, &v}) {
    for (const Real16 value : array->Get()) result.push_back(Double(value));
  }
  return result;
}

// Attention that rotates its one token a sequence itself, against a kernel before it that does.
bool CheckRotation(const RotationCase& c) {
  const RotationData data(c);
  const std::vector<double> inside = RunRotation(c, data, Rotates::kInside);
  if (RunRotation(c, data, Rotates::kInsideOfParts) != inside) {
    std::printf("FAIL attention that adds parts up differs\n");
    return false;
  }
  const bool fixed =
      Tested() == Element::kHalf && AttentionLeavesFixed(c.heads, c.kv_heads, c.head_dim);
  if (fixed) {
    const std::vector<double> got = RunRotation(c, data, Rotates::kInsideToFixed);
    const auto outputs = static_cast<std::ptrdiff_t>(c.positions.size()) * c.heads * c.head_dim;
    if (got.size() != inside.size() ||
        !std::equal(got.begin() + outputs, got.end(), inside.begin() + outputs) ||
        !Report("attention into fixed point", {inside.begin(), inside.begin() + outputs},
                {got.begin(), got.begin() + outputs}, 5e-4)) {
      std::printf("FAIL attention into fixed point\n");
      return false;
    }
  }
  return Report(std::string(TestedName()) + " attention that rotates, " + std::to_string(c.heads) +
                    "/" + std::to_string(c.kv_heads) + " head_dim " + std::to_string(c.head_dim) +
                    " in " + std::to_string(c.blocks) + " blocks" + (c.norms ? " with norms" : ""),
                RunRotation(c, data, Rotates::kBefore), inside, Limit(1e-3));
}

constexpr int32_t kSmall = 320;  // positions

bool CheckAll(bool small, const std::vector<AttentionCase>& cases) {
  bool ok = true;
  for (const AttentionCase& c : cases) {
    const bool is_small = std::all_of(
        c.sequences.begin(), c.sequences.end(),
        [](const auto& sequence) { return sequence.first + sequence.second <= kSmall; });
    if (!is_small && small) continue;
    if (KernelsForHopper()) ok = CheckAttention(c) && ok;
    AttentionCase portable = c;
    portable.portable = true;
    ok = CheckAttention(portable) && ok;
  }
  return ok;
}

bool CheckStreaming(bool small) {
  return CheckAll(
      small,
      {AttentionCase{8, 2, 128, 0, 132, {{0, 37}, {100, 1}, {63, 5}}},
       AttentionCase{9, 3, 64, 0, 132, {{0, 130}, {15, 1}, {16, 1}}},
       AttentionCase{9, 3, 64, 0, 4, {{1000, 1}, {0, 1}, {31, 2}}},
       AttentionCase{9, 3, 64, 0, 40, {{1000, 1}, {0, 1}, {31, 2}}},
       AttentionCase{32, 8, 128, 0, 132, {{517, 1}, {2000, 1}}},
       AttentionCase{4, 4, 128, 0, 132, {{8191, 1}}},
       AttentionCase{4, 4, 16, 20, 132, {{0, 50}, {77, 3}}},
       AttentionCase{4, 2, 32, 33, 3, {{300, 9}, {31, 1}}},
       AttentionCase{8, 1, 128, 100, 20, {{700, 2}, {99, 1}, {100, 1}}},
       AttentionCase{16, 1, 128, 0, 132, {{400, 3}}},
       AttentionCase{16, 2, 64, 0, 132, {{700, 3}, {5, 1}, {255, 2}, {256, 1}, {15, 1}}},
       AttentionCase{8, 2, 128, 0, 132, {{300, 1}, {17, 1}}},
       AttentionCase{8, 2, 128, 0, 132, {{300, 3}, {17, 1}, {0, 4}}},
       AttentionCase{9, 3, 64, 0, 132, std::vector<std::pair<int32_t, int32_t>>(16, {200, 1})},
       AttentionCase{4, 1, 128, 0, 2, std::vector<std::pair<int32_t, int32_t>>(90, {33, 1})}});
}

bool CheckPrompts(bool small) {
  return CheckAll(small, {AttentionCase{8, 2, 128, 0, 0, {{0, 200}}},
                          AttentionCase{4, 1, 128, 0, 0, {{0, 31}, {127, 1}, {128, 70}}},
                          AttentionCase{9, 3, 64, 0, 0, {{0, 300}, {17, 65}, {1000, 43}}},
                          AttentionCase{2, 2, 128, 0, 0, {{0, 130}, {513, 129}}},
                          AttentionCase{8, 1, 128, 0, 0, {{300, 100}}},
                          AttentionCase{16, 1, 64, 0, 0, {{2000, 17}}},
                          AttentionCase{4, 1, 128, 100, 0, {{0, 300}, {777, 50}}},
                          AttentionCase{2, 1, 64, 7, 0, {{0, 129}, {500, 80}}},
                          AttentionCase{2, 1, 64, 7, 0, {{0, 129}}}});
}

bool CheckRotations(bool small) {
  bool ok = true;
  for (const RotationCase& c :
       {RotationCase{6, 2, 128, 132, false, {0, 37, 300, 599, 15, 16}},
        RotationCase{6, 2, 128, 132, true, {0, 37, 300, 599, 15, 16}},
        RotationCase{6, 2, 64, 132, true, {0, 37, 300, 599, 15, 16}},
        RotationCase{6, 2, 64, 3, false, {0, 37, 300, 599, 15, 16, 1023}},
        RotationCase{32, 8, 128, 132, false, {255}}, RotationCase{32, 8, 128, 132, false, {4095}},
        RotationCase{8, 1, 128, 132, true, {100, 2000}},
        RotationCase{16, 1, 128, 2, true, {31, 32, 33, 400}},
        RotationCase{3, 3, 128, 7, false, {511, 512, 0, 1, 2, 191, 192, 193}},
        RotationCase{4, 2, 32, 132, true, {0, 37, 300}},
        RotationCase{4, 2, 16, 5, true, {0, 37, 300, 50}}}) {
    const int32_t last = *std::max_element(c.positions.begin(), c.positions.end());
    if (last < kSmall || !small) ok = CheckRotation(c) && ok;
  }
  return ok;
}

}  // namespace
}  // namespace nibble::cuda

int main(int argc, char** argv) {
  using namespace nibble::cuda;
  const bool small = argc > 1 && std::strcmp(argv[1], "small") == 0;
  bool ok = true;
  for (const Element element : {Element::kHalf, Element::kBfloat16}) {
    Tested() = element;
    ok = CheckStreaming(small) && ok;
    if (KernelsForHopper()) ok = CheckRotations(small) && ok;
    ok = CheckPrompts(small) && ok;
  }
  std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
  return ok ? 0 : 1;
}
