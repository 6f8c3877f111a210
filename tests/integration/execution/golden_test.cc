// The third-party AWQ checkpoint gives the tokens, log-probabilities and perplexity that
// transformers computed for it in fp32.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "tests/integration/execution/smollm2.h"
#include "tests/support/in_process_group.h"

namespace nibble {
namespace {

using testing::GoldenPrompt;
using testing::InProcessGroup;
using weights::HeadFormat;
using weights::Numerics;

constexpr int32_t kContext = 512;

InProcessGroup::Options Exact(int32_t ranks, int32_t threads = 1) {
  return {.ranks = ranks,
          .memory = {.numerics = Numerics::kExact,
                     .max_slots = 16,
                     .max_step_tokens = 512,
                     .max_context = kContext},
          .threads = threads};
}

InProcessGroup::Options Fast(HeadFormat head, int32_t ranks = 1, int32_t threads = 1) {
  InProcessGroup::Options options = Exact(ranks, threads);
  options.memory.numerics = Numerics::kFast;
  options.memory.head = head;
  return options;
}

double LogSumExp(const std::vector<float>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - max);
  return max + std::log(sum);
}

class GoldenTest : public ::testing::Test {
 protected:
  GoldenTest() : checkpoint_(testing::SmolCheckpoint("GoldenTest")) {}
  const weights::Checkpoint* const checkpoint_;
};

struct GreedyRun {
  std::vector<std::vector<int32_t>> tokens;  // of each prompt
  double largest_difference = 0;             // of a log-probability from the golden's
};

// All prompts at once, so that steps hold sequences of different lengths.
GreedyRun Generate(const weights::Checkpoint& checkpoint, const InProcessGroup::Options& options,
                   const std::vector<GoldenPrompt>& goldens) {
  InProcessGroup group(checkpoint, options);
  const auto count = static_cast<int32_t>(goldens.size());
  for (int32_t slot = 0; slot < count; ++slot) {
    const GoldenPrompt& golden = goldens[static_cast<size_t>(slot)];
    group.OpenGreedy(slot, golden.prompt);
    group.Feed(slot, golden.prompt, 1, 5);
  }
  GreedyRun run{.tokens = std::vector<std::vector<int32_t>>(goldens.size())};
  for (size_t step = 0; step < goldens[0].generated.size(); ++step) {
    if (step > 0) {
      for (int32_t slot = 0; slot < count; ++slot) group.FeedSampled(slot, 5);
    }
    const step::StepResult result = group.Run();
    for (size_t i = 0; i < goldens.size(); ++i) {
      run.tokens[i].push_back(result.tokens[i].token_id);
      const double difference = std::abs(static_cast<double>(result.tokens[i].logprob) -
                                         static_cast<double>(goldens[i].logprobs[step]));
      run.largest_difference = std::max(run.largest_difference, difference);
      EXPECT_EQ(result.top_logprobs[i * 5].token_id, result.tokens[i].token_id);
    }
  }
  return run;
}

void ExpectGoldens(const weights::Checkpoint& checkpoint, const InProcessGroup::Options& options,
                   double tolerance = 2e-3) {
  const std::vector<GoldenPrompt> goldens = testing::ReadGoldens(checkpoint.folder());
  const GreedyRun run = Generate(checkpoint, options, goldens);
  for (size_t i = 0; i < goldens.size(); ++i) {
    EXPECT_EQ(run.tokens[i], goldens[i].generated) << goldens[i].name;
  }
  EXPECT_LT(run.largest_difference, tolerance);
  std::printf("%d ranks: largest difference of a log-probability %.2e\n", options.ranks,
              run.largest_difference);
}

TEST_F(GoldenTest, ExactNumericsGiveEveryGreedyToken) {
  if (checkpoint_ == nullptr) return;
  ExpectGoldens(*checkpoint_, Exact(1, 2));
}

TEST_F(GoldenTest, TwoRanksGiveEveryGreedyToken) {
  if (checkpoint_ == nullptr) return;
  ExpectGoldens(*checkpoint_, Exact(2));
}

TEST_F(GoldenTest, ThreeRanksGiveEveryGreedyToken) {
  if (checkpoint_ == nullptr) return;
  ExpectGoldens(*checkpoint_, Exact(3));
}

// More ranks than KV heads: two ranks share one.
TEST_F(GoldenTest, FourRanksGiveEveryGreedyToken) {
  if (checkpoint_ == nullptr) return;
  ExpectGoldens(*checkpoint_, Exact(4));
}

// The law is for exact numerics; two int8 terms keep it.
TEST_F(GoldenTest, FastNumericsWithTheStoredHeadGiveEveryGreedyToken) {
  if (checkpoint_ == nullptr) return;
  for (const int32_t ranks : {1, 2, 3, 4}) {
    ExpectGoldens(*checkpoint_, Fast(HeadFormat::kStored, ranks, ranks == 1 ? 2 : 1), 1e-2);
  }
}

// Where the default leaves the reference's tokens, the reference itself was close to another (the
// largest margin was 0.088); behind that step the texts differ. The bound is what PyTorch in bf16
// needs.
TEST_F(GoldenTest, TheDefaultLeavesTheTokensOnlyWhereTheMarginIsSmallAtEveryDegree) {
  if (checkpoint_ == nullptr) return;
  constexpr float kMarginMax = 0.175F;
  const std::vector<GoldenPrompt> goldens = testing::ReadGoldens(checkpoint_->folder());
  for (const int32_t ranks : {1, 2, 3, 4}) {
    const GreedyRun run =
        Generate(*checkpoint_, Fast(HeadFormat::kInt8, ranks, ranks == 1 ? 2 : 1), goldens);
    for (size_t i = 0; i < goldens.size(); ++i) {
      const GoldenPrompt& golden = goldens[i];
      const auto [mine, wanted] =
          std::mismatch(run.tokens[i].begin(), run.tokens[i].end(), golden.generated.begin());
      if (mine == run.tokens[i].end()) continue;
      const auto step = static_cast<size_t>(mine - run.tokens[i].begin());
      std::printf("%d ranks, %s: step %zu, margin %.3f\n", ranks, golden.name.c_str(), step,
                  static_cast<double>(golden.margins[step]));
      EXPECT_LE(golden.margins[step], kMarginMax) << golden.name << ", " << ranks << " ranks";
    }
  }
}

// Mean and largest difference of a passage's log-probabilities.
TEST_F(GoldenTest, LogprobsOfAPassageAgree) {
  if (checkpoint_ == nullptr) return;
  const nlohmann::json reference = testing::ReadJson(checkpoint_->folder() + "/logprobs.json");
  const auto ids = reference.at("token_ids").get<std::vector<int32_t>>();
  InProcessGroup group(*checkpoint_, Exact(1, 2));
  group.KeepLogits();
  group.OpenGreedy(0);
  group.Feed(0, ids, static_cast<int32_t>(ids.size()));
  static_cast<void>(group.Run());
  for (size_t i = 1; i < ids.size(); ++i) {
    const std::vector<float>& logits = group.Logits(0, static_cast<int32_t>(i) - 1);
    const double got = static_cast<double>(logits[static_cast<size_t>(ids[i])]) - LogSumExp(logits);
    EXPECT_NEAR(got, reference.at("logprobs").at(i).get<double>(), 2e-3) << i;
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    EXPECT_EQ(best, reference.at("argmax_ids").at(i).get<int64_t>()) << i;
  }
}

// exp of the mean negative log-likelihood over the windows of perplexity.json: `windows` side by
// side, 64 tokens of each a step, every row's logits taken.
double Perplexity(const weights::Checkpoint& checkpoint, const InProcessGroup::Options& options,
                  int32_t windows) {
  constexpr int32_t kWindow = 512, kPiece = 64, kTogether = 8;
  const nlohmann::json reference = testing::ReadJson(checkpoint.folder() + "/perplexity.json");
  const auto ids = reference.at("token_ids").get<std::vector<int32_t>>();
  InProcessGroup group(checkpoint, options);
  std::vector<double> nll(static_cast<size_t>(windows));
  const auto token = [&](int32_t window, int32_t position) {
    return ids[static_cast<size_t>(window * kWindow + position)];
  };
  int32_t first = 0;  // window of slot 0
  group.group().rank(0).set_logits_observer([&](int32_t slot, int32_t position,
                                                std::span<const float> logits) {
    if (position + 1 == kWindow) return;
    const int32_t window = first + slot;
    const std::vector<float> row(logits.begin(), logits.end());
    nll[static_cast<size_t>(window)] +=
        LogSumExp(row) - static_cast<double>(row[static_cast<size_t>(token(window, position + 1))]);
  });
  for (first = 0; first < windows; first += kTogether) {
    const int32_t together = std::min(kTogether, windows - first);
    for (int32_t slot = 0; slot < together; ++slot) group.OpenGreedy(slot);
    for (int32_t begin = 0; begin < kWindow; begin += kPiece) {
      for (int32_t slot = 0; slot < together; ++slot) {
        const auto from = static_cast<size_t>((first + slot) * kWindow + begin);
        group.Feed(slot, std::span(ids).subspan(from, kPiece), kPiece);
      }
      static_cast<void>(group.Run());
    }
    for (int32_t slot = 0; slot < together; ++slot) group.Close(slot);
  }
  double mean = 0;
  const auto& windows_nll = reference.at("awq_dequantised").at("window_nll");
  double expected = 0;
  for (int32_t window = 0; window < windows; ++window) {
    mean += nll[static_cast<size_t>(window)] / (kWindow - 1) / windows;
    expected += windows_nll.at(static_cast<size_t>(window)).get<double>() / windows;
  }
  std::printf("perplexity %.5f, expected %.5f: %+.4f %%\n", std::exp(mean), std::exp(expected),
              100 * (std::exp(mean - expected) - 1));
  return std::exp(mean - expected) - 1;
}

TEST_F(GoldenTest, ExactPerplexityIsWithinTwoHundredthsOfAPercent) {
  if (checkpoint_ == nullptr) return;
  EXPECT_LT(std::abs(Perplexity(*checkpoint_, Exact(1, 2), 16)), 0.0002);
}

TEST_F(GoldenTest, FastPerplexityWithTheStoredHeadIsWithinFiveHundredthsOfAPercent) {
  if (checkpoint_ == nullptr) return;
  EXPECT_LT(std::abs(Perplexity(*checkpoint_, Fast(HeadFormat::kStored, 1, 2), 16)), 0.0005);
}

TEST_F(GoldenTest, FastPerplexityWithTheInt8HeadIsWithinThreeTenthsOfAPercent) {
  if (checkpoint_ == nullptr) return;
  EXPECT_LT(std::abs(Perplexity(*checkpoint_, Fast(HeadFormat::kInt8, 1, 2), 16)), 0.003);
}

}  // namespace
}  // namespace nibble
