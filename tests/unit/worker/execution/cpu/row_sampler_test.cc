// The sampler against a slow float64 reference and against the distributions it must draw from.
#include "worker/execution/cpu/row_sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/sampling/random.h"

namespace nibble::execution {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> RandomLogits(int32_t vocab, uint32_t seed, float spread = 3) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(static_cast<size_t>(vocab));
  for (float& logit : logits) logit = normal(random);
  return logits;
}

// What may be sampled, with which probability: the definition, in float64 and with full sorts.
std::map<int32_t, double> ReferenceDistribution(const step::SamplingParams& params,
                                                const std::vector<float>& adjusted) {
  struct Token {
    int32_t id;
    double p;
  };
  std::vector<Token> tokens;
  double max = -1e300;
  for (const float logit : adjusted) max = std::max(max, static_cast<double>(logit));
  for (size_t i = 0; i < adjusted.size(); ++i) {
    if (adjusted[i] == -kInfinity) continue;
    const double temperature = static_cast<double>(params.temperature);
    tokens.push_back({static_cast<int32_t>(i), std::exp((adjusted[i] - max) / temperature)});
  }
  const auto normalise = [&] {
    double total = 0;
    for (const Token& token : tokens) total += token.p;
    for (Token& token : tokens) token.p /= total;
  };
  const auto by_probability = [](const Token& a, const Token& b) {
    return a.p > b.p || (a.p == b.p && a.id < b.id);
  };
  const auto keep_until = [&](double share) {
    double sum = 0;
    size_t kept = 0;
    while (kept < tokens.size() && sum < share) sum += tokens[kept++].p;
    tokens.resize(std::max<size_t>(kept, 1));
  };
  normalise();
  std::sort(tokens.begin(), tokens.end(), by_probability);
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < tokens.size()) {
    tokens.resize(static_cast<size_t>(params.top_k));
    normalise();
  }
  if (params.typical_p < 1) {
    double entropy = 0;
    for (const Token& token : tokens) entropy -= token.p * std::log(token.p);
    std::sort(tokens.begin(), tokens.end(), [&](const Token& a, const Token& b) {
      return std::abs(-std::log(a.p) - entropy) < std::abs(-std::log(b.p) - entropy);
    });
    keep_until(static_cast<double>(params.typical_p));
    std::sort(tokens.begin(), tokens.end(), by_probability);
    normalise();
  }
  if (params.top_p < 1) {
    keep_until(static_cast<double>(params.top_p));
    normalise();
  }
  const double best = tokens.front().p;
  std::erase_if(tokens, [&](const Token& token) {
    return token.p < static_cast<double>(params.min_p) * best;
  });
  normalise();
  std::map<int32_t, double> distribution;
  for (const Token& token : tokens) distribution[token.id] = token.p;
  return distribution;
}

// The token that the Gumbel trick must pick from `distribution`.
int32_t ReferenceChoice(const std::map<int32_t, double>& distribution, uint64_t seed,
                        uint64_t output_index) {
  int32_t choice = -1;
  double best = -1e300;
  for (const auto& [id, p] : distribution) {
    const double u = sampling::UniformFromBits(
        sampling::UniformBits(sampling::OutputStream(seed, output_index), id));
    const double score = std::log(p) - std::log(-std::log(u));
    if (score > best) {
      best = score;
      choice = id;
    }
  }
  return choice;
}

struct Case {
  const char* name;
  step::SamplingParams params;
};

std::vector<Case> Cases() {
  return {
      {"plain", {.temperature = 1}},
      {"hot", {.temperature = 2.5f}},
      {"cool", {.temperature = 0.3f}},
      {"top_k", {.temperature = 1, .top_k = 5}},
      {"top_k_1", {.temperature = 1, .top_k = 1}},
      {"top_p", {.temperature = 1, .top_p = 0.7f}},
      {"top_p_tiny", {.temperature = 1, .top_p = 1e-6f}},
      {"top_p_wide_hot", {.temperature = 4, .top_p = 0.99f}},
      {"min_p", {.temperature = 1, .min_p = 0.1f}},
      {"min_p_1", {.temperature = 1, .min_p = 1}},
      {"typical", {.temperature = 1, .typical_p = 0.6f}},
      {"typical_top_p", {.temperature = 1.2f, .top_p = 0.8f, .typical_p = 0.9f}},
      {"all",
       {.temperature = 0.8f, .top_p = 0.9f, .min_p = 0.02f, .typical_p = 0.95f, .top_k = 40}},
  };
}

TEST(RowSamplerTest, ChoosesWhatTheReferenceChooses) {
  constexpr int32_t kVocab = 1000;
  RowSampler sampler(kVocab);
  for (const Case& test : Cases()) {
    for (uint32_t round = 0; round < 50; ++round) {
      const std::vector<float> logits = RandomLogits(kVocab, round);
      const RowRequest request{.params = &test.params, .seed = round * 31, .output_index = round};
      std::vector<float> row = logits;
      const Candidate got = sampler.Sample(request, row);
      const auto distribution = ReferenceDistribution(test.params, logits);
      EXPECT_EQ(got.token_id, ReferenceChoice(distribution, request.seed, request.output_index))
          << test.name << " round " << round;
      EXPECT_EQ(got.non_finite, 0);
    }
  }
}

// Pearson's chi-square of many draws against the exact probabilities.
TEST(RowSamplerTest, DrawsFollowTheDistribution) {
  constexpr int32_t kVocab = 50;
  constexpr int kDraws = 20'000;
  RowSampler sampler(kVocab);
  const std::vector<float> logits = RandomLogits(kVocab, 5, 1);
  for (const Case& test : Cases()) {
    const auto distribution = ReferenceDistribution(test.params, logits);
    std::map<int32_t, int> seen;
    for (int draw = 0; draw < kDraws; ++draw) {
      // Outputs of one request, as a sequence draws them.
      const RowRequest request{
          .params = &test.params, .seed = 99, .output_index = static_cast<uint64_t>(draw)};
      std::vector<float> row = logits;
      ++seen[sampler.Sample(request, row).token_id];
    }
    double chi_square = 0;
    for (const auto& [id, p] : distribution) {
      const double expected = p * kDraws;
      chi_square += (seen[id] - expected) * (seen[id] - expected) / expected;
    }
    for (const auto& [id, count] : seen) EXPECT_EQ(distribution.count(id), 1u) << test.name;
    // Six standard deviations above the mean of the chi-square distribution.
    const double freedom = static_cast<double>(distribution.size()) - 1;
    EXPECT_LT(chi_square, freedom + 6 * std::sqrt(2 * freedom) + 1e-9) << test.name;
  }
}

TEST(RowSamplerTest, APenaltysOverflowEndsADraw) {
  PenaltyCounts counts(1, 4);
  counts.Reset(0, std::vector<int32_t>{2}, 1);
  const std::vector<float> logits = {1, 2, 3e38f, 0};
  for (const float top_p : {1.0f, 0.9f}) {
    const step::SamplingParams params{
        .temperature = 1, .top_p = top_p, .repetition_penalty = 0.01f};
    RowSampler sampler(4);
    std::vector<float> row = logits;
    const RowRequest request{.params = &params, .counts = counts.Row(0)};
    EXPECT_EQ(sampler.Sample(request, row).non_finite, 1) << top_p;
  }
}

TEST(RowSamplerTest, DifferentSeedsDrawIndependently) {
  constexpr int kDraws = 20'000;
  RowSampler sampler(4);
  const step::SamplingParams params;
  const std::vector<float> logits = {0, 0, 0, 0};
  std::vector<int> seen(4);
  for (int seed = 0; seed < kDraws; ++seed) {
    const RowRequest request{.params = &params, .seed = static_cast<uint64_t>(seed)};
    std::vector<float> row = logits;
    ++seen[static_cast<size_t>(sampler.Sample(request, row).token_id)];
  }
  for (const int count : seen) EXPECT_NEAR(count, kDraws / 4, 6 * std::sqrt(kDraws * 3.0 / 16));
}

TEST(RowSamplerTest, PartsOfARowMergeToTheWholeRow) {
  constexpr int32_t kVocab = 4099;
  RowSampler sampler(kVocab);
  for (const float temperature : {0.0f, 0.2f, 1.0f, 3.0f, 50.0f}) {
    const step::SamplingParams params{.temperature = temperature};
    for (uint64_t round = 0; round < 20; ++round) {
      const std::vector<float> logits = RandomLogits(kVocab, static_cast<uint32_t>(round), 8);
      const RowRequest request{.params = &params, .seed = round, .output_index = 2};
      ASSERT_TRUE(WorksOnPartOfRow(request, kVocab));
      std::vector<float> row = logits;
      const Candidate whole = sampler.Sample(request, row);
      Candidate merged;
      for (int32_t begin = kVocab; begin > 0;) {
        const int32_t size = std::min(begin, 517);
        begin -= size;
        const std::span<const float> part =
            std::span(logits).subspan(static_cast<size_t>(begin), static_cast<size_t>(size));
        Merge(BestOf(request, begin, part), &merged);
      }
      EXPECT_EQ(merged.token_id, whole.token_id) << temperature;
      EXPECT_EQ(merged.score, whole.score);
      // The shortcut around logarithms changes nothing.
      if (temperature > 0) {
        EXPECT_EQ(whole.token_id, ReferenceChoice(ReferenceDistribution(params, logits), round, 2));
      }
    }
  }
}

TEST(RowSamplerTest, FiltersAndLogprobsNeedTheWholeRow) {
  const auto part = [](step::SamplingParams params, int32_t logprobs = -1) {
    return WorksOnPartOfRow({.params = &params, .logprobs = logprobs}, 100);
  };
  EXPECT_TRUE(part({}));
  EXPECT_TRUE(part({.temperature = 0, .top_p = 0.5f, .top_k = 3}));
  EXPECT_TRUE(part({.top_k = 100}));
  EXPECT_FALSE(part({.top_k = 99}));
  EXPECT_FALSE(part({.top_p = 0.9f}));
  EXPECT_FALSE(part({.min_p = 0.1f}));
  EXPECT_FALSE(part({.typical_p = 0.9f}));
  EXPECT_FALSE(part({.temperature = 0}, 0));
}

TEST(RowSamplerTest, TiesGoToTheLowerId) {
  RowSampler sampler(64);
  std::vector<float> row(64, 1.0f);
  const step::SamplingParams greedy{.temperature = 0};
  EXPECT_EQ(sampler.Sample({.params = &greedy}, row).token_id, 0);
  std::vector<float> later(64, 1.0f);
  later[40] = later[17] = 2.0f;
  EXPECT_EQ(sampler.Sample({.params = &greedy}, later).token_id, 17);
  // top_k keeps the lower ids of a tie.
  const step::SamplingParams two{.temperature = 1, .top_k = 2};
  for (uint64_t seed = 0; seed < 100; ++seed) {
    std::vector<float> tied(64, 1.0f);
    EXPECT_LT(sampler.Sample({.params = &two, .seed = seed}, tied).token_id, 2);
  }
}

class AdjustTest : public ::testing::Test {
 protected:
  static constexpr int32_t kVocab = 40;

  std::vector<float> Adjusted(const RowRequest& request, std::vector<float> logits) {
    AdjustLogits(request, 0, logits);
    return logits;
  }

  PenaltyCounts counts_{2, kVocab};
};

TEST_F(AdjustTest, PenaltiesFollowTheirDefinition) {
  // Prompt 3 3 5, output 5 7 7 7.
  const std::vector<int32_t> history = {3, 3, 5, 5, 7, 7, 7};
  counts_.Reset(1, history, 3);
  const step::SamplingParams params{
      .presence_penalty = 0.5f, .frequency_penalty = 0.25f, .repetition_penalty = 2};
  std::vector<float> logits(kVocab, 4.0f);
  logits[5] = -1.0f;
  const auto got = Adjusted({.params = &params, .counts = counts_.Row(1)}, logits);
  EXPECT_FLOAT_EQ(got[0], 4.0f);
  EXPECT_FLOAT_EQ(got[3], 2.0f);                     // prompt only: repetition
  EXPECT_FLOAT_EQ(got[5], -2.0f - 0.25f - 0.5f);     // both, negative logit
  EXPECT_FLOAT_EQ(got[7], 2.0f - 3 * 0.25f - 0.5f);  // three times in the output
  counts_.AddOutput(1, 0);
  EXPECT_FLOAT_EQ(Adjusted({.params = &params, .counts = counts_.Row(1)}, logits)[0],
                  2.0f - 0.25f - 0.5f);
}

TEST_F(AdjustTest, AResetForgetsTheSlotsFormerSequence) {
  const std::vector<int32_t> history = {1, 2, 3};
  counts_.Reset(0, history, 1);
  counts_.Reset(0, std::vector<int32_t>{4}, 1);
  EXPECT_EQ(counts_.Row(0)[1], 0);
  EXPECT_EQ(counts_.Row(0)[2], 0);
  EXPECT_EQ(counts_.Row(0)[4], kInPrompt);
  EXPECT_EQ(counts_.Row(1)[4], 0);
}

TEST_F(AdjustTest, DraftsCountAsOutput) {
  const step::SamplingParams params{.presence_penalty = 1, .frequency_penalty = 0.5f};
  counts_.Reset(0, std::vector<int32_t>{9, 9}, 1);  // 9 stands in prompt and output
  const std::vector<int32_t> drafts = {9, 11, 9};
  std::vector<float> logits(kVocab, 0.0f);
  logits[11] = 3.0f;
  const auto got =
      Adjusted({.params = &params, .counts = counts_.Row(0), .drafts = drafts}, logits);
  EXPECT_FLOAT_EQ(got[9], -1 - 3 * 0.5f);
  EXPECT_FLOAT_EQ(got[11], 3 - 1 - 0.5f);
  for (const int32_t token : drafts) counts_.AddOutput(0, token);
  EXPECT_EQ(got, Adjusted({.params = &params, .counts = counts_.Row(0)}, logits));
}

TEST_F(AdjustTest, BiasIsAddedAndMasksExclude) {
  step::SamplingParams params{.temperature = 0};
  params.logit_bias = {{.token_id = 4, .bias = 100}, {.token_id = 39, .bias = -2}};
  std::vector<uint32_t> mask = {0xffffffffu, 0xffffffffu};
  mask[4 / 32] &= ~(1u << 4);
  const std::vector<int32_t> stops = {0};
  std::vector<float> logits(kVocab, 1.0f);
  const auto got = Adjusted({.params = &params, .mask = mask.data(), .forbidden = stops}, logits);
  EXPECT_EQ(got[4], -kInfinity);
  EXPECT_EQ(got[0], -kInfinity);
  EXPECT_FLOAT_EQ(got[39], -1.0f);
  EXPECT_FLOAT_EQ(got[38], 1.0f);
}

TEST_F(AdjustTest, PartsAreAdjustedLikeTheWhole) {
  step::SamplingParams params{.presence_penalty = 0.3f, .repetition_penalty = 1.3f};
  params.logit_bias = {{.token_id = 12, .bias = 3}, {.token_id = 31, .bias = -1}};
  counts_.Reset(0, std::vector<int32_t>{1, 12, 12, 33, 20}, 2);
  const std::vector<uint32_t> mask = {0xfffdffffu, 0x7fu};
  const std::vector<int32_t> stops = {2, 30}, drafts = {20, 33};
  const RowRequest request{.params = &params,
                           .counts = counts_.Row(0),
                           .mask = mask.data(),
                           .forbidden = stops,
                           .drafts = drafts};
  const std::vector<float> logits = RandomLogits(kVocab, 3);
  const std::vector<float> whole = Adjusted(request, logits);
  for (int32_t split = 0; split <= kVocab; split += 7) {
    std::vector<float> row = logits;
    const auto size = static_cast<size_t>(split);
    AdjustLogits(request, 0, std::span(row).first(size));
    AdjustLogits(request, split, std::span(row).subspan(size));
    EXPECT_EQ(row, whole);
  }
}

TEST(RowSamplerTest, NonFiniteLogitsAreFlagged) {
  RowSampler sampler(100);
  for (const float bad : {kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (const size_t at : {size_t{0}, size_t{50}, size_t{99}}) {
      for (const step::SamplingParams& params :
           {step::SamplingParams{.temperature = 0}, step::SamplingParams{},
            step::SamplingParams{.top_p = 0.5f, .typical_p = 0.5f, .top_k = 7}}) {
        std::vector<float> row(100, 0.5f);
        row[at] = bad;
        EXPECT_TRUE(HasNonFinite(row));
        EXPECT_EQ(sampler.Sample({.params = &params}, row).non_finite, 1);
      }
    }
  }
  std::vector<float> masked(100, -kInfinity);
  EXPECT_FALSE(HasNonFinite(masked));
  const step::SamplingParams params{.top_p = 0.5f};
  EXPECT_EQ(sampler.Sample({.params = &params}, masked).token_id, -1);
}

TEST(RowSamplerTest, LogprobsAreThoseOfTheRawLogits) {
  constexpr int32_t kVocab = 3001;
  RowSampler sampler(kVocab);
  std::vector<float> logits = RandomLogits(kVocab, 8);
  logits[5] = logits[1000] = 20;  // a tie at the top
  double total = 0;
  for (const float logit : logits) total += std::exp(static_cast<double>(logit) - 20);
  const double log_sum_exp = sampler.LogSumExp(logits);
  EXPECT_NEAR(log_sum_exp, 20 + std::log(total), 1e-10);
  std::vector<int32_t> order(kVocab);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  for (const int32_t count : {0, 1, 2, 20}) {
    std::vector<step::TokenLogprob> top(static_cast<size_t>(count));
    sampler.TopLogprobs(logits, log_sum_exp, count, top.data());
    for (int32_t i = 0; i < count; ++i) {
      const auto at = static_cast<size_t>(i);
      EXPECT_EQ(top[at].token_id, order[at]);
      EXPECT_NEAR(top[at].logprob, logits[static_cast<size_t>(order[at])] - log_sum_exp, 1e-5);
    }
  }
}

}  // namespace
}  // namespace nibble::execution
