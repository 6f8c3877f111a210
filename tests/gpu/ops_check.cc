// Checks each kernel against a plain computation in double, at odd sizes. Needs a GPU.
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/elementwise.h"
#include "kernels/cuda/sample.h"
#include "kernels/cuda/w4_batch.h"
#include "kernels/cuda/w4_large.h"
#include "tests/gpu/device_array.h"
#include "worker/execution/cpu/random.h"
#include "worker/execution/cpu/row_sampler.h"

namespace nibble::cuda {
namespace {

std::mt19937 g_random(7);

std::vector<float> Normal(size_t count, float deviation) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = normal(g_random);
  return values;
}
std::vector<half> Halves(const std::vector<float>& values) {
  std::vector<half> halves;
  for (const float value : values) halves.push_back(__float2half(value));
  return halves;
}
std::vector<half> NormalHalves(size_t count, float deviation) {
  return Halves(Normal(count, deviation));
}
double Double(half value) { return static_cast<double>(__half2float(value)); }

bool Report(const std::string& name, const std::vector<double>& want,
            const std::vector<double>& got, double limit) {
  double difference = 0, norm = 1e-30;
  for (size_t i = 0; i < want.size(); ++i) {
    const double d = want[i] - got[i];
    difference += std::isfinite(d) ? d * d : 1e30;
    norm += want[i] * want[i];
  }
  const double error = std::sqrt(difference / norm);
  const bool ok = want.size() == got.size() && error < limit;
  std::printf("%-4s %-64s error %.2e\n", ok ? "ok" : "FAIL", name.c_str(), error);
  return ok;
}

struct BatchCase {
  int32_t rows, columns, group, tokens;
  DecodeOutput output;
  bool bias;
};

struct Logical {
  std::vector<uint8_t> q, zeros;
  std::vector<half> scales, dense;

  explicit Logical(const BatchCase& c) {
    const auto count = static_cast<size_t>(c.rows) * static_cast<size_t>(c.columns);
    if (c.group == 0) {
      dense = NormalHalves(count, 0.02f);
      return;
    }
    const size_t groups = count / static_cast<size_t>(c.group);
    for (size_t i = 0; i < count; ++i) q.push_back(static_cast<uint8_t>(g_random() % 16));
    for (size_t i = 0; i < groups; ++i) {
      zeros.push_back(static_cast<uint8_t>(g_random() % 16));
      scales.push_back(__float2half(0.001f + 0.00001f * static_cast<float>(g_random() % 1000)));
    }
  }
  [[nodiscard]] double Weight(const BatchCase& c, int32_t row, int32_t k) const {
    const auto at =
        static_cast<size_t>(row) * static_cast<size_t>(c.columns) + static_cast<size_t>(k);
    if (c.group == 0) return Double(dense[at]);
    const size_t group = at / static_cast<size_t>(c.group);
    return (q[at] - zeros[group]) * Double(scales[group]);
  }
};

std::vector<double> PlainProduct(const BatchCase& c, const Logical& w, const std::vector<half>& x,
                                 const std::vector<half>& bias) {
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
std::vector<half> Packed(const std::vector<half>& bias, bool pairs) {
  if (!pairs) return bias;
  std::vector<half> packed(bias.size());
  for (size_t i = 0; i < bias.size() / 2; ++i) {
    packed[i / 8 * 16 + i % 8] = bias[i];
    packed[i / 8 * 16 + 8 + i % 8] = bias[bias.size() / 2 + i];
  }
  return packed;
}

// By W4Batch, or by W4Large where it has its scratch memory.
bool CheckBatch(const BatchCase& c, const LargeScratch* large = nullptr) {
  const Logical w(c);
  const auto rows = static_cast<size_t>(c.rows), tokens = static_cast<size_t>(c.tokens);
  const std::vector<half> x = NormalHalves(tokens * static_cast<size_t>(c.columns), 1);
  const std::vector<half> bias = NormalHalves(rows, 1);
  const bool silu = c.output == DecodeOutput::kSiluMul;
  const DeviceArray<uint8_t> q(w.q.empty() ? std::vector<uint8_t>(1) : w.q);
  const DeviceArray<uint8_t> zeros(w.zeros.empty() ? std::vector<uint8_t>(1) : w.zeros);
  const DeviceArray<half> scales(w.scales.empty() ? std::vector<half>(1) : w.scales);
  const DeviceArray<half> dense(w.dense.empty() ? std::vector<half>(1) : w.dense);
  const DeviceArray<half> dx(x), dbias(Packed(bias, silu));
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
  const DeviceArray<half> y_half(tokens * out_rows);
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
  if (large == nullptr) {
    CUDA_OK(W4Batch(params, nullptr, false));
  } else if (W4Large(params, *large, nullptr) != CUBLAS_STATUS_SUCCESS) {
    std::printf("FAIL W4Large gave an error\n");
    return false;
  }
  CUDA_OK(cudaDeviceSynchronize());
  std::vector<double> want = PlainProduct(c, w, x, bias), got;
  if (c.output == DecodeOutput::kAddResidual) {
    for (double& value : want) value += 0.25;
    for (const float value : residual.Get()) got.push_back(static_cast<double>(value));
  } else if (c.output == DecodeOutput::kFloat) {
    for (const float value : y_float.Get()) got.push_back(static_cast<double>(value));
  } else {
    for (const half value : y_half.Get()) got.push_back(Double(value));
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
  return Report(std::string(large == nullptr ? "" : "large ") + "product rows " +
                    std::to_string(c.rows) + " columns " + std::to_string(c.columns) + " group " +
                    std::to_string(c.group) + " tokens " + std::to_string(c.tokens) + " output " +
                    std::to_string(static_cast<int>(c.output)),
                want, got, 1.5e-3);
}

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
    std::shuffle(order.begin(), order.end(), g_random);
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
  std::shuffle(tables.begin(), tables.end(), g_random);
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

// The device's token, and the host sampler's from the same logits.
bool CheckSample(int32_t vocab, double temperature) {
  constexpr int32_t kRows = 5;
  std::vector<float> logits = Normal(static_cast<size_t>(kRows * vocab), 3);
  if (vocab > 7) logits[7] = logits[3] = 50;  // a tie in row 0
  std::vector<SampleRow> rows;
  step::SamplingParams params;
  params.temperature = static_cast<float>(temperature);
  for (int32_t row = 0; row < kRows; ++row) {
    rows.push_back(
        {.stream = execution::OutputStream(99, static_cast<uint64_t>(row)),
         .inverse_temperature = temperature > 0 ? 1.0 / static_cast<double>(params.temperature) : 0,
         .slot = row});
  }
  const auto last = static_cast<size_t>(kRows - 1) * static_cast<size_t>(vocab);
  logits[last + static_cast<size_t>(vocab / 2)] = NAN;
  const DeviceArray<float> dlogits(logits);
  const DeviceArray<SampleRow> drows(rows);
  const DeviceArray<SampledToken> sampled(kRows);
  const DeviceArray<int32_t> tokens(kRows);
  CUDA_OK(Sample({.logits = dlogits.get(),
                  .rows = drows.get(),
                  .count = kRows,
                  .vocab_size = vocab,
                  .sampled = sampled.get(),
                  .last_tokens = tokens.get()},
                 {}));
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
  std::printf("%-4s sampling of %d tokens at temperature %.2f\n", ok ? "ok" : "FAIL", vocab,
              temperature);
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

bool CheckLarge() {
  LargeScratch scratch;
  const DeviceArray<half> weights(static_cast<size_t>(kLargeScratchBytes / 2));
  const DeviceArray<half> gate_up(size_t{160} * kLargeSliceRowsMax);
  scratch.weights = weights.get();
  scratch.gate_up = gate_up.get();
  if (cublasCreate(&scratch.handle) != CUBLAS_STATUS_SUCCESS) return false;
  bool ok = true;
  for (const BatchCase& c : {BatchCase{384, 1024, 128, 96, DecodeOutput::kHalf, false},
                             BatchCase{208, 576, 64, 131, DecodeOutput::kFloat, false},
                             BatchCase{176, 160, 32, 97, DecodeOutput::kAddResidual, false},
                             BatchCase{8320, 128, 128, 100, DecodeOutput::kSiluMul, false}}) {
    ok = CheckBatch(c, &scratch) && ok;
  }
  cublasDestroy(scratch.handle);
  return ok;
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
  bool ok = CheckBatches();
  ok = CheckLarge() && ok;
  ok = CheckAttentions() && ok;
  for (const int32_t head_dim : {64, 128}) {
    for (const int32_t splits : {1, 6}) {
      for (const bool norms : {false, true}) ok = CheckRotation(head_dim, splits, norms) && ok;
    }
  }
  for (const int32_t vocab : {5, 32000, 49153}) {
    for (const double temperature : {0.0, 0.7, 1.3}) ok = CheckSample(vocab, temperature) && ok;
  }
  std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
  return ok ? 0 : 1;
}
