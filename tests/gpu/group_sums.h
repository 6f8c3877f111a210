// Sums over ranks for group_check: their cases, what a rank takes in and leaves, and what it must.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <optional>
#include <random>
#include <vector>

#include "kernels/cuda/peer_exchange.h"
#include "kernels/cuda/w4_decode.h"
#include "kernels/cuda/w4_order.h"
#include "kernels/layout/gpu_w4.h"
#include "kernels/layout/gpu_x.h"
#include "tests/gpu/comparison.h"
#include "tests/gpu/device_array.h"

namespace nibble::gpu_check {

using cuda::DeviceArray;

inline constexpr int32_t kBlocks = 12;        // of every launch of a product
inline constexpr int32_t kColumnsMax = 8192;  // of sums
inline constexpr int32_t kTokensMax = 64;
inline constexpr int32_t kParts = 5;
// How often a case's sum is taken before it is looked at.
inline constexpr int kRounds = 5;

inline uint32_t SeedOf(int32_t rank) { return 100 + static_cast<uint32_t>(rank); }

inline std::vector<float> Normal(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}
inline std::vector<cuda::Real16> Reals(const std::vector<float>& values) {
  std::vector<cuda::Real16> reals;
  for (const float value : values) reals.push_back(cuda::ToReal(value));
  return reals;
}

// A sum over ranks: taken by a decode product whose weights have `columns` columns on each rank, or
// by the norm behind a product, where there are none.
struct SumCase {
  int32_t tokens, rows;
  int32_t columns = 0;
  int32_t group = 128;
  int32_t next_group = -1;  // of the next product's weights, whose order x then has
  cuda::Element element = cuda::Element::kHalf;
  bool dependent = true;

  [[nodiscard]] bool in_norm() const { return columns == 0; }
  // Whether kernels that start early leave room for those they wait for, where `ranks` share a GPU:
  // all rounds may be about at once, of blocks that take a multiprocessor or half of one.
  [[nodiscard]] bool FitsTogether(int32_t ranks) const {
    constexpr int32_t kMultiprocessors = 132;
    const int32_t blocks = ranks * kRounds * (in_norm() ? tokens : kBlocks);
    return blocks <= (in_norm() || tokens > 8 ? 1 : 2) * kMultiprocessors;
  }
  [[nodiscard]] size_t count() const {
    return static_cast<size_t>(tokens) * static_cast<size_t>(rows);
  }
};

inline std::vector<SumCase> SumCases(int32_t ranks) {
  constexpr SumCase kShapes[] = {{0, 64, 256, 64, 128},
                                 {0, 576, 512, 32},
                                 {0, 1000, 512, 0, 64},
                                 {0, 4096, 1536, 128, 128},
                                 {0, 8192, 1024, 128, 32}};
  std::vector<SumCase> cases;
  for (const auto element : {cuda::Element::kHalf, cuda::Element::kBfloat16}) {
    for (SumCase c : kShapes) {
      c.element = element;
      for (const int32_t tokens : {1, 2, 3, 8, 16}) {
        c.tokens = tokens;
        c.dependent = c.FitsTogether(ranks);
        cases.push_back(c);
      }
    }
    for (const int32_t hidden : {64, 576, 4096, 8192}) {
      for (const int32_t tokens : {9, 16, 33, 64}) {
        if (tokens * ranks > 128) continue;  // all blocks of all ranks must find room on one GPU
        SumCase c{.tokens = tokens, .rows = hidden, .element = element};
        c.dependent = c.FitsTogether(ranks);
        cases.push_back(c);
      }
    }
  }
  return cases;
}

// Random weights of a share, packed; every rank's are the same, its activations are not.
class Weights {
 public:
  explicit Weights(const SumCase& c)
      : slabs_(static_cast<size_t>(
            std::max<int64_t>(1, cuda::W4DecodeBytes(c.rows, c.columns, c.group)))) {
    if (c.in_norm()) return;
    const auto count = static_cast<size_t>(c.rows) * static_cast<size_t>(c.columns);
    std::mt19937 random(5);
    cuda::PackW4Params pack{.rows = c.rows, .columns = c.columns, .group = c.group};
    if (c.group == 0) {
      std::vector<float> values = Normal(count, 6);
      for (float& value : values) value *= 0.02f;
      dense_.emplace(Reals(values));
      pack.dense = dense_->get();
    } else {
      const size_t groups = count / static_cast<size_t>(c.group);
      std::vector<uint8_t> q(count), zeros(groups);
      std::vector<half> scales(groups);
      for (uint8_t& value : q) value = static_cast<uint8_t>(random() % 16);
      for (uint8_t& value : zeros) value = static_cast<uint8_t>(random() % 16);
      for (half& value : scales) {
        value = __float2half(0.001f + 0.00001f * static_cast<float>(random() % 1000));
      }
      q_.emplace(q);
      zeros_.emplace(zeros);
      scales_.emplace(scales);
      pack.q = q_->get();
      pack.zeros = zeros_->get();
      pack.scales = scales_->get();
    }
    pack.slabs = slabs_.get();
    CUDA_OK(cuda::PackW4(pack, nullptr));
    CUDA_OK(cudaDeviceSynchronize());
  }
  [[nodiscard]] const uint8_t* slabs() const { return slabs_.get(); }

 private:
  std::optional<DeviceArray<uint8_t>> q_, zeros_;
  std::optional<DeviceArray<half>> scales_;
  std::optional<DeviceArray<cuda::Real16>> dense_;
  DeviceArray<uint8_t> slabs_;
};

// What a sum takes in and leaves on one rank.
struct Sum {
  Sum(int32_t rank, const SumCase& of)
      : c(of),
        order(c.next_group < 0 ? layout::GpuFragmentOrder{}
                               : layout::GpuFragments(c.tokens, c.next_group)),
        weights(c),
        x(Reals(Normal(static_cast<size_t>(c.tokens * std::max(8, c.columns)), SeedOf(rank)))),
        parts(Normal(c.in_norm() ? kParts * c.count() : 1, SeedOf(rank))),
        alone(std::vector<float>(c.count(), 0.0f)),
        residual(Normal(c.count(), 1)),
        norm_weight(std::vector<cuda::Real16>(static_cast<size_t>(c.rows), cuda::ToReal(1.5f))),
        scale(std::vector<float>(static_cast<size_t>(c.tokens), 3.0f)),
        next_x(static_cast<size_t>(std::max({layout::GpuFragmentCount(c.tokens, c.rows),
                                             layout::GpuOrderedCount(c.tokens, c.rows)}))),
        plain_x(next_x.count()),
        squares(static_cast<size_t>(c.tokens * layout::GpuRowTiles(c.rows))) {}

  [[nodiscard]] cuda::W4DecodeParams Product(const cuda::PeerExchange& exchange) const {
    cuda::W4DecodeParams p;
    p.slabs = weights.slabs();
    p.rows = c.rows;
    p.columns = c.columns;
    p.group = c.group;
    p.tokens = c.tokens;
    p.x = x.get();
    p.output = cuda::DecodeOutput::kAddResidual;
    p.residual_out = residual.get();
    p.next = {.x = next_x.get(),
              .norm_weight = norm_weight.get(),
              .scale = scale.get(),
              .square_sums = squares.get(),
              .order = order};
    p.exchange = exchange;
    p.dependent_launch = c.dependent;
    p.element = c.element;
    return p;
  }
  [[nodiscard]] cuda::OrderedNormParams Norm(const cuda::PeerExchange& exchange) const {
    return {.residual = residual.get(),
            .rows = nullptr,
            .weight = norm_weight.get(),
            .tokens = c.tokens,
            .hidden = c.rows,
            .epsilon = 1e-5f,
            .ordered = next_x.get(),
            .parts = parts.get(),
            .part_count = kParts,
            .exchange = exchange};
  }
  void Launch(const cuda::PeerExchange& exchange, cudaStream_t stream) const {
    if (!c.in_norm()) {
      CUDA_OK(cuda::W4Decode(Product(exchange), kBlocks, stream));
      return;
    }
    CUDA_OK(cuda::OrderedNorm(Norm(exchange),
                              {.stream = stream, .dependent = c.dependent, .element = c.element}));
  }
  // This rank's part of the sum, as kernels that exchange nothing have it. Products of other
  // outputs may add up in another order, so this one adds to zeros.
  [[nodiscard]] std::vector<float> Part() const {
    if (!c.in_norm()) {
      cuda::W4DecodeParams p = Product({});
      p.residual_out = alone.get();
      p.next.x = plain_x.get();
      CUDA_OK(cuda::W4Decode(p, kBlocks, nullptr));
      CUDA_OK(cudaDeviceSynchronize());
      return alone.Get();
    }
    const std::vector<float> all = parts.Get();
    std::vector<float> sum(c.count(), 0.0f);
    for (size_t i = 0; i < all.size(); ++i) sum[i % sum.size()] += all[i];
    for (float& value : sum) value = cuda::ToFloat(cuda::ToReal(value));
    return sum;
  }

  const SumCase c;
  const layout::GpuFragmentOrder order;
  const Weights weights;
  DeviceArray<cuda::Real16> x;
  DeviceArray<float> parts, alone, residual;
  DeviceArray<cuda::Real16> norm_weight;
  DeviceArray<float> scale;
  DeviceArray<cuda::Real16> next_x, plain_x;
  DeviceArray<float> squares;
};

// How far what a product leaves for the next one is from what it should be.
inline double NextInputError(const Sum& sum, const std::vector<float>& residual) {
  const std::vector<cuda::Real16> x = sum.next_x.Get();
  double worst = 0, squares_want = 0, squares_got = 0;
  for (size_t i = 0; i < sum.c.count(); ++i) {
    const auto value = static_cast<double>(residual[i]);
    const auto at = static_cast<int32_t>(i);
    const auto in_x =
        static_cast<size_t>(sum.order.Index(at / sum.c.rows, at % sum.c.rows, sum.c.rows));
    const double error = std::abs(cuda::Double(x[in_x]) - value * 4.5 * cuda::kNormedInputFactor);
    worst = std::max(worst, error == error ? error : 1e30);  // NaN where nothing was written
    squares_want += value * value;
  }
  for (const float part : sum.squares.Get()) squares_got += static_cast<double>(part);
  const double off = std::abs(squares_got / squares_want - 1);
  return off < 1e-5 ? worst : 1e30;
}

// The same of a norm: what one without a sum makes of the residual stream that this one left.
inline double NormError(const Sum& sum) {
  const std::vector<cuda::Real16> got = sum.next_x.Get();
  cuda::OrderedNormParams plain = sum.Norm({});
  plain.parts = nullptr;
  plain.ordered = sum.plain_x.get();
  CUDA_OK(cuda::OrderedNorm(plain, {.element = sum.c.element}));
  CUDA_OK(cudaDeviceSynchronize());
  const std::vector<cuda::Real16> want = sum.plain_x.Get();
  double worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(cuda::Double(got[i]) - cuda::Double(want[i]));
    const bool both_unwritten = want[i].bits == 0xffff && got[i].bits == 0xffff;
    if (!both_unwritten) worst = std::max(worst, error == error ? error : 1e30);
  }
  return worst;
}

// What `rank` holds after kRounds sums of the ranks' `parts`.
inline bool SumHolds(const Sum& sum, int32_t rank, const std::vector<std::vector<float>>& parts) {
  const SumCase& c = sum.c;
  std::vector<float> total(c.count(), 0.0f);
  for (const std::vector<float>& part : parts) {
    for (size_t i = 0; i < total.size(); ++i) total[i] += part[i];
  }
  std::vector<float> want = Normal(c.count(), 1);
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < want.size(); ++i) want[i] += total[i];
  }
  const std::vector<float> got = sum.residual.Get();
  size_t wrong = 0;  // in rank order: the same bits
  for (size_t i = 0; i < want.size(); ++i) wrong += got[i] != want[i] ? 1 : 0;
  const double error = c.in_norm() ? NormError(sum) : NextInputError(sum, want);
  const bool ok = wrong == 0 && error < cuda::Limit(c.in_norm() ? 8e-3 : 4e-3);
  std::printf("%s rank %d: %s sum in a %s, %d x %d, group %d, next %d: %zu values differ, x %.1e\n",
              ok ? "ok  " : "FAIL", rank, cuda::TestedName(), c.in_norm() ? "norm" : "product",
              c.tokens, c.rows, c.group, c.next_group, wrong, error);
  return ok;
}

}  // namespace nibble::gpu_check
