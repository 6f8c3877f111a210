// Attention: equal bits at every level, for every split of tokens and heads; close to a naive
// softmax in fp64; what a token must not see is never used.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "tests/unit/kernels/kernel_data.h"

namespace nibble::cpu {
namespace {

constexpr int32_t kBlock = 16;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Setting {
  int32_t head_dim = 64;
  int32_t heads = 3;
  int32_t kv_heads = 1;
  int32_t first_position = 0;
  int32_t tokens = 1;
  int32_t window = 0;
  ElementType type = ElementType::kF16;

  std::string Describe() const {
    return "head_dim " + std::to_string(head_dim) + " heads " + std::to_string(heads) + "/" +
           std::to_string(kv_heads) + " first " + std::to_string(first_position) + " tokens " +
           std::to_string(tokens) + " window " + std::to_string(window) +
           (type == ElementType::kF16 ? " f16" : " f32");
  }
};

// A cache in which everything that no token sees is NaN, and a block table in which every entry
// that no token needs would lead far outside it.
class Problem {
 public:
  Problem(const Setting& setting, Random& random, float q_scale = 1.0F)
      : setting_(setting),
        end_(setting.first_position + setting.tokens),
        blocks_((end_ + kBlock - 1) / kBlock),
        q_(RandomFloats(static_cast<int64_t>(setting.tokens) * q_stride(), random, q_scale)),
        k_(RandomFloats(end_ * kv_width(), random)),
        v_(RandomFloats(end_ * kv_width(), random)),
        keys_(blocks_ * kBlock * kv_width() * (is_f32() ? 2 : 1)),
        values_(keys_.size()),
        table_(static_cast<size_t>(blocks_) + 4, std::numeric_limits<int32_t>::max() / 2) {
    FillWithNan();
    const Kernels& kernels = GetKernels(IsaLevel::kReference);
    const int32_t first_seen = FirstSeen(setting.first_position);
    for (int32_t b = first_seen / kBlock; b < blocks_; ++b) {
      table_[static_cast<size_t>(b)] = (b * 7 + 3) % blocks_;  // a shuffled order
    }
    if (std::gcd(7, blocks_) != 1) {
      for (int32_t b = first_seen / kBlock; b < blocks_; ++b) {
        table_[static_cast<size_t>(b)] = blocks_ - 1 - b;
      }
    }
    for (int32_t p = first_seen; p < end_; ++p) {
      kernels.write_kv(cache(), k_.data() + p * kv_width(), v_.data() + p * kv_width(),
                       table_[static_cast<size_t>(p / kBlock)], p % kBlock);
    }
    if (!is_f32()) {
      for (int64_t i = 0; i < k_.size(); ++i) {
        k_[i] = HalfToFloat(FloatToHalf(k_[i]));
        v_[i] = HalfToFloat(FloatToHalf(v_[i]));
      }
    }
  }

  void SetValue(int32_t position, int32_t kv_head, float value) {
    const int64_t base =
        (static_cast<int64_t>(table_[static_cast<size_t>(position / kBlock)]) * setting_.kv_heads +
         kv_head) *
            kBlock * setting_.head_dim +
        static_cast<int64_t>(position % kBlock) * setting_.head_dim;
    values_[base] = FloatToHalf(value);
  }

  std::vector<float> Run(IsaLevel level) const {
    std::vector<float> out(static_cast<size_t>(setting_.tokens * out_stride()), -77.0F);
    GetKernels(level).attention(Args(out.data()), 0, setting_.tokens, 0, setting_.heads);
    return out;
  }

  // Every (token, head) in a call of its own.
  std::vector<float> RunOneByOne(IsaLevel level) const {
    std::vector<float> out(static_cast<size_t>(setting_.tokens * out_stride()), -77.0F);
    for (int32_t t = 0; t < setting_.tokens; ++t) {
      for (int32_t h = 0; h < setting_.heads; ++h) {
        GetKernels(level).attention(Args(out.data()), t, t + 1, h, h + 1);
      }
    }
    return out;
  }

  // Each token as the only one of its step, as decode would have it.
  std::vector<float> RunAsDecode(IsaLevel level) const {
    std::vector<float> out(static_cast<size_t>(setting_.tokens * out_stride()), -77.0F);
    for (int32_t t = 0; t < setting_.tokens; ++t) {
      AttentionArgs args = Args(out.data() + t * out_stride());
      args.q = q_.data() + t * q_stride();
      args.first_position = setting_.first_position + t;
      GetKernels(level).attention(args, 0, 1, 0, setting_.heads);
    }
    return out;
  }

  // Softmax in fp64, one output element.
  double Exact(int32_t t, int32_t h, int32_t d) const {
    const int32_t position = setting_.first_position + t;
    const int32_t kv_head = h * setting_.kv_heads / setting_.heads;
    double total = 0;
    double sum = 0;
    double largest = -1e300;
    std::vector<double> scores;
    for (int32_t p = FirstSeen(position); p <= position; ++p) {
      double score = 0;
      for (int32_t i = 0; i < setting_.head_dim; ++i) {
        score += static_cast<double>(q_[t * q_stride() + h * setting_.head_dim + i]) *
                 k_[p * kv_width() + kv_head * setting_.head_dim + i];
      }
      scores.push_back(score * scale());
      largest = std::max(largest, scores.back());
    }
    for (int32_t p = FirstSeen(position); p <= position; ++p) {
      const double weight =
          std::exp(scores[static_cast<size_t>(p - FirstSeen(position))] - largest);
      total += weight;
      sum += weight * v_[p * kv_width() + kv_head * setting_.head_dim + d];
    }
    return sum / total;
  }

  int64_t out_stride() const { return setting_.heads * setting_.head_dim + 5; }

 private:
  bool is_f32() const { return setting_.type == ElementType::kF32; }
  int64_t q_stride() const { return setting_.heads * setting_.head_dim + 24; }
  int64_t kv_width() const { return static_cast<int64_t>(setting_.kv_heads) * setting_.head_dim; }
  float scale() const { return 1.0F / std::sqrt(static_cast<float>(setting_.head_dim)); }
  int32_t FirstSeen(int32_t position) const {
    return setting_.window > 0 ? std::max(0, position + 1 - setting_.window) : 0;
  }
  void FillWithNan() {
    for (Buffer<uint16_t>* half : {&keys_, &values_}) {
      for (int64_t i = 0; i < half->size(); ++i) (*half)[i] = 0x7fffU;  // NaN in fp16 and in fp32
    }
  }
  KvCache cache() const {
    return {.keys = const_cast<uint16_t*>(keys_.data()),
            .values = const_cast<uint16_t*>(values_.data()),
            .type = setting_.type,
            .kv_heads = setting_.kv_heads,
            .head_dim = setting_.head_dim};
  }
  AttentionArgs Args(float* out) const {
    return {.q = q_.data(),
            .q_stride = q_stride(),
            .out = out,
            .out_stride = out_stride(),
            .cache = cache(),
            .block_table = table_.data(),
            .first_position = setting_.first_position,
            .window = setting_.window,
            .heads = setting_.heads,
            .scale = scale()};
  }

  Setting setting_;
  int32_t end_;
  int32_t blocks_;
  Buffer<float> q_, k_, v_;
  Buffer<uint16_t> keys_, values_;
  std::vector<int32_t> table_;
};

// Head sizes that are odd multiples of 8, one vector, several, and beyond the fp32 panel; few and
// many query heads for a KV head; positions around blocks (16) and tiles (64); windows inside a
// block and across tiles.
std::vector<Setting> Settings() {
  std::vector<Setting> settings;
  for (const int32_t head_dim : {8, 16, 24, 32, 40, 64, 72, 80, 96, 128, 256, 264}) {
    settings.push_back({.head_dim = head_dim, .heads = 4, .kv_heads = 2, .tokens = 21});
    settings.push_back(
        {.head_dim = head_dim, .heads = 9, .kv_heads = 3, .first_position = 129, .tokens = 1});
  }
  for (const int32_t first : {0, 5, 15, 16, 47, 63, 64, 65, 127, 200}) {
    for (const int32_t tokens : {1, 2, 17, 70}) {
      settings.push_back({.head_dim = 16, .first_position = first, .tokens = tokens});
    }
  }
  for (const int32_t heads : {1, 2, 4, 5, 6, 7, 8, 13, 50}) {
    settings.push_back({.head_dim = 32, .heads = heads, .first_position = 70, .tokens = 3});
  }
  settings.push_back({.head_dim = 32, .heads = 7, .kv_heads = 2, .first_position = 9, .tokens = 5});
  for (const int32_t window : {1, 7, 16, 40, 64, 100, 1000}) {
    for (const int32_t first : {0, 63, 150}) {
      settings.push_back({.head_dim = 24,
                          .heads = 6,
                          .kv_heads = 2,
                          .first_position = first,
                          .tokens = 25,
                          .window = window});
    }
  }
  const size_t count = settings.size();
  for (size_t i = 0; i < count; i += 3) {
    settings.push_back(settings[i]);
    settings.back().type = ElementType::kF32;
  }
  return settings;
}

TEST(AttentionTest, EveryLevelAndSplitHasTheBitsOfTheReference) {
  Random random(1);
  for (const Setting& setting : Settings()) {
    const Problem problem(setting, random);
    const std::vector<float> expected = problem.Run(IsaLevel::kReference);
    for (const IsaLevel level : RunnableLevels()) {
      const std::string what = std::string(IsaLevelName(level)) + " " + setting.Describe();
      EXPECT_EQ(FirstDifference(problem.Run(level), expected), -1) << what;
      EXPECT_EQ(FirstDifference(problem.RunOneByOne(level), expected), -1) << what;
      EXPECT_EQ(FirstDifference(problem.RunAsDecode(level), expected), -1) << what;
    }
  }
}

TEST(AttentionTest, IsSoftmaxOverWhatATokenSees) {
  Random random(2);
  for (const Setting& setting : Settings()) {
    const Problem problem(setting, random);
    const std::vector<float> out = problem.Run(IsaLevel::kReference);
    for (int32_t t = 0; t < setting.tokens; t += 6) {
      for (int32_t h = 0; h < setting.heads; ++h) {
        for (int32_t d = 0; d < setting.head_dim; d += 3) {
          const float got =
              out[static_cast<size_t>(t * problem.out_stride() + h * setting.head_dim + d)];
          ASSERT_NEAR(got, problem.Exact(t, h, d), 2e-6) << setting.Describe();
        }
      }
    }
  }
}

// Scores of several hundreds: later tiles raise the maximum and wipe out what was summed before.
TEST(AttentionTest, LargeScoresNeitherOverflowNorLoseTheMaximum) {
  Random random(3);
  for (const int32_t head_dim : {16, 64}) {
    const Setting setting = {
        .head_dim = head_dim, .heads = 3, .kv_heads = 1, .first_position = 300, .tokens = 4};
    const Problem problem(setting, random, 1000.0F);
    const std::vector<float> expected = problem.Run(IsaLevel::kReference);
    for (int32_t h = 0; h < 3; ++h) {
      EXPECT_NEAR(expected[static_cast<size_t>(h * head_dim)], problem.Exact(0, h, 0), 1e-3);
    }
    for (const IsaLevel level : RunnableLevels()) {
      EXPECT_EQ(FirstDifference(problem.Run(level), expected), -1) << IsaLevelName(level);
    }
  }
}

TEST(AttentionTest, NanAndInfinityReachOnlyTokensThatSeeThem) {
  Random random(4);
  for (const float poison : {kNan, std::numeric_limits<float>::infinity()}) {
    const Setting setting = {.head_dim = 32, .heads = 4, .kv_heads = 2, .tokens = 40};
    Problem problem(setting, random);
    problem.SetValue(20, 1, poison);
    const std::vector<float> expected = problem.Run(IsaLevel::kReference);
    for (int32_t t = 0; t < setting.tokens; ++t) {
      for (int32_t h = 0; h < setting.heads; ++h) {
        const float first = expected[static_cast<size_t>(t * problem.out_stride() + h * 32)];
        EXPECT_EQ(std::isfinite(first), t < 20 || h < 2) << "token " << t << " head " << h;
      }
    }
    for (const IsaLevel level : RunnableLevels()) {
      EXPECT_EQ(FirstDifference(problem.Run(level), expected), -1) << IsaLevelName(level);
    }
  }
}

}  // namespace
}  // namespace nibble::cpu
