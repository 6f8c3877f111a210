// Checks attention against a plain computation in double, at odd sizes. Needs a GPU.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/elementwise.h"
#include "tests/gpu/comparison.h"
#include "tests/gpu/device_array.h"

namespace nibble::cuda {
namespace {

struct AttentionCase {
  int32_t heads, kv_heads, head_dim, window, splits;
  std::vector<std::pair<int32_t, int32_t>> sequences;  // first position, tokens
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
    const int32_t all = slots * blocks_;
    std::vector<int32_t> order;
    for (int32_t i = 0; i < all; ++i) order.push_back(i);
    std::shuffle(order.begin(), order.end(), Random());
    tables_ = order;
    q_ = NormalHalves(static_cast<size_t>(rows_ * c.heads * c.head_dim), 1);
    const auto cache = static_cast<size_t>(all * c.kv_heads * 16 * c.head_dim);
    keys_ = NormalHalves(cache, 1);
    values_ = NormalHalves(cache, 1);
    PoisonBeyondTheEnd();
    int32_t row = 0;
    const int32_t step = AttentionTileTokens(c.heads, c.kv_heads);
    for (int32_t slot = 0; slot < slots; ++slot) {
      const auto& [first, tokens] = c.sequences[static_cast<size_t>(slot)];
      for (int32_t t = 0; t < tokens; t += step) {
        tiles_.push_back({row + t, std::min(step, tokens - t), first + t, slot});
      }
      row += tokens;
    }
  }

  [[nodiscard]] std::vector<double> Expected() const {
    std::vector<double> out;
    for (size_t slot = 0; slot < c_.sequences.size(); ++slot) {
      const auto& [first, tokens] = c_.sequences[slot];
      for (int32_t t = 0; t < tokens; ++t, ++expected_row_) {
        for (int32_t head = 0; head < c_.heads; ++head) {
          const std::vector<double> row = Row(static_cast<int32_t>(slot), first + t, head);
          out.insert(out.end(), row.begin(), row.end());
        }
      }
    }
    return out;
  }

  [[nodiscard]] std::vector<double> OnDevice() const {
    const DeviceArray<half> q(q_), keys(keys_), values(values_);
    const DeviceArray<half> out(q_.size());
    const DeviceArray<int32_t> tables(tables_);
    const DeviceArray<AttentionTile> tiles(tiles_);
    const auto count = static_cast<int32_t>(tiles_.size());
    const DeviceArray<float> scratch(static_cast<size_t>(
        AttentionScratchFloats(int64_t{count} * c_.splits, c_.kv_heads, c_.head_dim)));
    const DeviceArray<int32_t> arrivals(
        std::vector<int32_t>(static_cast<size_t>(count * c_.kv_heads), 0));
    const AttentionParams params{.q = q.get(),
                                 .q_stride = int64_t{c_.heads} * c_.head_dim,
                                 .out = out.get(),
                                 .cache = {.keys = keys.get(), .values = values.get()},
                                 .block_tables = tables.get(),
                                 .table_size = blocks_,
                                 .tiles = tiles.get(),
                                 .tile_count = count,
                                 .heads = c_.heads,
                                 .kv_heads = c_.kv_heads,
                                 .head_dim = c_.head_dim,
                                 .window = c_.window,
                                 .scale = 1.0f / std::sqrt(static_cast<float>(c_.head_dim)),
                                 .splits = c_.splits,
                                 .scratch = scratch.get(),
                                 .arrivals = arrivals.get()};
    // Twice: the second finds the arrivals as the first left them.
    for (int32_t run = 0; run < 2; ++run) CUDA_OK(Attention(params, {}));
    CUDA_OK(cudaDeviceSynchronize());
    std::vector<double> result;
    for (const half value : out.Get()) result.push_back(Double(value));
    return result;
  }

 private:
  [[nodiscard]] size_t Block(int32_t slot, int32_t position, int32_t kv_head) const {
    const int32_t block = tables_[static_cast<size_t>(slot * blocks_ + position / 16)];
    return static_cast<size_t>((block * c_.kv_heads + kv_head) * 16 * c_.head_dim);
  }
  [[nodiscard]] size_t KeyAt(int32_t slot, int32_t position, int32_t kv_head, int32_t i) const {
    return Block(slot, position, kv_head) + static_cast<size_t>(position % 16 * c_.head_dim + i);
  }
  [[nodiscard]] size_t ValueAt(int32_t slot, int32_t position, int32_t kv_head, int32_t i) const {
    return Block(slot, position, kv_head) + static_cast<size_t>(i * 16 + position % 16);
  }
  void PoisonBeyondTheEnd() {
    const half nan = __float2half(std::nanf(""));
    for (size_t slot = 0; slot < c_.sequences.size(); ++slot) {
      const int32_t end = c_.sequences[slot].first + c_.sequences[slot].second;
      for (int32_t position = end; position < blocks_ * 16; ++position) {
        for (int32_t head = 0; head < c_.kv_heads; ++head) {
          for (int32_t i = 0; i < c_.head_dim; ++i) {
            keys_[KeyAt(static_cast<int32_t>(slot), position, head, i)] = nan;
            values_[ValueAt(static_cast<int32_t>(slot), position, head, i)] = nan;
          }
        }
      }
    }
  }
  [[nodiscard]] std::vector<double> Row(int32_t slot, int32_t position, int32_t head) const {
    const int32_t kv_head = head / (c_.heads / c_.kv_heads);
    const int32_t begin = c_.window > 0 ? std::max(0, position - c_.window + 1) : 0;
    std::vector<double> out(static_cast<size_t>(c_.head_dim), 0.0);
    double sum = 0;
    for (int32_t key = begin; key <= position; ++key) {
      double score = 0;
      for (int32_t i = 0; i < c_.head_dim; ++i) {
        score +=
            Double(q_[static_cast<size_t>((expected_row_ * c_.heads + head) * c_.head_dim + i)]) *
            Double(keys_[KeyAt(slot, key, kv_head, i)]);
      }
      const double weight = std::exp(score / std::sqrt(static_cast<double>(c_.head_dim)));
      sum += weight;
      for (int32_t i = 0; i < c_.head_dim; ++i) {
        out[static_cast<size_t>(i)] += weight * Double(values_[ValueAt(slot, key, kv_head, i)]);
      }
    }
    for (double& value : out) value /= sum;
    return out;
  }

  const AttentionCase& c_;
  int32_t rows_ = 0, blocks_ = 0;
  mutable int32_t expected_row_ = 0;
  std::vector<int32_t> tables_;
  std::vector<half> q_, keys_, values_;
  std::vector<AttentionTile> tiles_;
};

bool CheckAttention(const AttentionCase& c) {
  const AttentionData data(c);
  return Report("attention heads " + std::to_string(c.heads) + "/" + std::to_string(c.kv_heads) +
                    " head_dim " + std::to_string(c.head_dim) + " window " +
                    std::to_string(c.window) + " splits " + std::to_string(c.splits),
                data.Expected(), data.OnDevice(), 2e-3);
}

// Attention that rotates its one token a sequence itself, against a kernel before it that does.
bool CheckRotation(int32_t head_dim, int32_t splits, bool norms) {
  constexpr int32_t kHeads = 6, kKvHeads = 2, kContext = 600, kTable = 38;
  const std::vector<int32_t> positions = {0, 37, 300, 599, 15, 16};
  const auto count = static_cast<int32_t>(positions.size());
  const auto width = static_cast<size_t>((kHeads + 2 * kKvHeads) * head_dim);
  const auto cache_size = static_cast<size_t>(count * kTable * kKvHeads * 16 * head_dim);
  std::vector<int32_t> tables, blocks;
  for (int32_t i = 0; i < count * kTable; ++i) tables.push_back(i);
  std::shuffle(tables.begin(), tables.end(), Random());
  std::vector<AttentionTile> tiles;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t position = positions[static_cast<size_t>(i)];
    blocks.push_back(tables[static_cast<size_t>(i * kTable + position / 16)]);
    tiles.push_back({i, 1, position, i});
  }
  const std::vector<half> qkv = NormalHalves(width * static_cast<size_t>(count), 1);
  const std::vector<half> keys = NormalHalves(cache_size, 1), values = NormalHalves(cache_size, 1);
  const DeviceArray<float> cos(Normal(static_cast<size_t>(kContext * head_dim / 2), 0.7f));
  const DeviceArray<float> sin(Normal(static_cast<size_t>(kContext * head_dim / 2), 0.7f));
  const DeviceArray<half> norm(NormalHalves(static_cast<size_t>(head_dim), 1));
  const DeviceArray<int32_t> dpositions(positions), dblocks(blocks), dtables(tables);
  const DeviceArray<AttentionTile> dtiles(tiles);
  const DeviceArray<float> scratch(
      static_cast<size_t>(AttentionScratchFloats(int64_t{count} * splits, kKvHeads, head_dim)));
  const DeviceArray<int32_t> arrivals(std::vector<int32_t>(static_cast<size_t>(count * kKvHeads)));
  const half* weight = norms ? norm.get() : nullptr;
  std::vector<double> results[2];
  for (int32_t inside = 0; inside < 2; ++inside) {
    const DeviceArray<half> q(qkv), k(keys), v(values);
    const DeviceArray<half> out(static_cast<size_t>(count * kHeads * head_dim));
    AttentionParams params{.q = q.get(),
                           .q_stride = static_cast<int64_t>(width),
                           .out = out.get(),
                           .cache = {.keys = k.get(), .values = v.get()},
                           .block_tables = dtables.get(),
                           .table_size = kTable,
                           .tiles = dtiles.get(),
                           .tile_count = count,
                           .heads = kHeads,
                           .kv_heads = kKvHeads,
                           .head_dim = head_dim,
                           .scale = 0.1f,
                           .splits = splits,
                           .scratch = scratch.get(),
                           .arrivals = arrivals.get()};
    if (inside == 1) {
      params.rotation = {cos.get(), sin.get(), weight, weight, 1e-6f};
    } else {
      CUDA_OK(RopeAndStore({.qkv = q.get(),
                            .tokens = count,
                            .heads = kHeads,
                            .kv_heads = kKvHeads,
                            .head_dim = head_dim,
                            .positions = dpositions.get(),
                            .blocks = dblocks.get(),
                            .cos = cos.get(),
                            .sin = sin.get(),
                            .q_norm = weight,
                            .k_norm = weight,
                            .epsilon = 1e-6f,
                            .cache = params.cache},
                           {}));
    }
    CUDA_OK(Attention(params, {}));
    CUDA_OK(cudaDeviceSynchronize());
    for (const auto* array : {&out, &k, &v}) {
      for (const half value : array->Get()) results[inside].push_back(Double(value));
    }
  }
  return Report("attention that rotates, head_dim " + std::to_string(head_dim) + " splits " +
                    std::to_string(splits) + (norms ? " with norms" : ""),
                results[0], results[1], 1e-3);
}

bool CheckAttentions() {
  bool ok = true;
  for (const AttentionCase& c : {AttentionCase{8, 2, 128, 0, 1, {{0, 37}, {100, 1}, {63, 5}}},
                                 AttentionCase{9, 3, 64, 0, 1, {{0, 130}, {15, 1}, {16, 1}}},
                                 AttentionCase{9, 3, 64, 0, 7, {{1000, 1}, {0, 1}, {31, 2}}},
                                 AttentionCase{32, 8, 128, 0, 16, {{517, 1}, {2000, 1}}},
                                 AttentionCase{4, 4, 16, 20, 1, {{0, 50}, {77, 3}}},
                                 AttentionCase{4, 2, 32, 33, 5, {{300, 9}, {31, 1}}},
                                 AttentionCase{16, 1, 128, 0, 3, {{400, 3}}}}) {
    ok = CheckAttention(c) && ok;
  }
  return ok;
}

}  // namespace
}  // namespace nibble::cuda

int main() {
  using namespace nibble::cuda;
  bool ok = CheckAttentions();
  for (const int32_t head_dim : {64, 128}) {
    for (const int32_t splits : {1, 6}) {
      for (const bool norms : {false, true}) ok = CheckRotation(head_dim, splits, norms) && ok;
    }
  }
  std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
  return ok ? 0 : 1;
}
