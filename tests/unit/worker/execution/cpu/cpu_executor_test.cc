// The executor's contract, on tiny models: slots, one step ahead, sampling, masks, drafts, errors.
#include "worker/execution/cpu/cpu_executor.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels/sampling/random.h"
#include "tests/support/in_process_group.h"
#include "tests/support/test_data.h"
#include "worker/collectives/self_communicator.h"

namespace nibble::execution {
namespace {

using testing::InProcessGroup;

std::string Folder(const char* name) {
  return testing::SourceDir() + "/tests/data/model-specs/" + name;
}

InProcessGroup::Options Options(int32_t ranks = 1, int32_t threads = 1) {
  return {.ranks = ranks,
          .memory = {.max_slots = 4, .max_step_tokens = 64, .max_context = 100, .kv_blocks = 28},
          .threads = threads};
}

const std::vector<int32_t> kPrompt = {5, 17, 250, 3, 3, 99, 128, 64, 2};

class CpuExecutorTest : public ::testing::TestWithParam<std::tuple<int32_t, int32_t>> {
 protected:
  CpuExecutorTest()
      : group_(Folder("llama-awq-gemm"),
               Options(std::get<0>(GetParam()), std::get<1>(GetParam()))) {}

  InProcessGroup::Generation Generate(const step::SamplingParams& sampling, int32_t count,
                                      int32_t logprobs = -1, uint64_t seed = 11) {
    return group_.Generate({.slot = 1,
                            .prompt = kPrompt,
                            .sampling = sampling,
                            .seed = seed,
                            .count = count,
                            .logprobs = logprobs});
  }

  InProcessGroup group_;
};

step::SamplingParams Greedy() {
  step::SamplingParams params;
  params.temperature = 0;
  return params;
}

TEST_P(CpuExecutorTest, OneStepAheadGivesTheSameTokens) {
  const std::vector<int32_t> want = Generate(Greedy(), 12).tokens;
  group_.OpenGreedy(3, kPrompt);
  group_.Feed(3, kPrompt, 1);
  group_.Launch();
  std::vector<int32_t> got;
  for (int i = 1; i < 12; ++i) {
    group_.FeedSampled(3);
    group_.Launch();  // before the step that samples its input was waited for
    got.push_back(group_.Wait().tokens.at(0).token_id);
  }
  got.push_back(group_.Wait().tokens.at(0).token_id);
  EXPECT_EQ(got, want);
}

// A sequence that ended at step t still has a row in t + 1: it disturbs nobody, and the slot can be
// used again.
TEST_P(CpuExecutorTest, ARowOfAnEndedSequenceIsHarmless) {
  const std::vector<int32_t> want = Generate(Greedy(), 6).tokens;
  group_.OpenGreedy(0, kPrompt);
  group_.Feed(0, kPrompt, 1);
  group_.Launch();
  group_.FeedSampled(0);
  group_.Launch();
  static_cast<void>(group_.Wait());  // suppose the sequence ended here
  group_.Close(0);
  group_.OpenGreedy(0, kPrompt);
  group_.Feed(0, kPrompt, 1);
  group_.Launch();
  static_cast<void>(group_.Wait());  // the row of the ended sequence: never delivered
  std::vector<int32_t> got;
  for (size_t i = 0; i < want.size(); ++i) {
    got.push_back(group_.Wait().tokens.at(0).token_id);
    if (i + 1 < want.size()) {
      group_.FeedSampled(0);
      group_.Launch();
    }
  }
  EXPECT_EQ(got, want);
}

TEST_P(CpuExecutorTest, ASampledRequestRepeatsItselfInAnyBatch) {
  step::SamplingParams plain;
  step::SamplingParams filtered;
  filtered.temperature = 0.9f;
  filtered.top_p = 0.9f;
  filtered.top_k = 50;
  filtered.presence_penalty = 0.4f;
  filtered.repetition_penalty = 1.2f;
  for (const step::SamplingParams& params : {plain, filtered}) {
    const std::vector<int32_t> want = Generate(params, 10).tokens;
    EXPECT_NE(Generate(params, 10, -1, 12).tokens, want) << "another seed";
    // The same request in another slot, beside others.
    for (int32_t slot = 0; slot < 4; ++slot) {
      group_.Open(slot, kPrompt, params, slot == 2 ? 11 : 1000 + static_cast<uint64_t>(slot));
      group_.Feed(slot, kPrompt, 1);
    }
    std::vector<int32_t> got;
    for (int i = 0; i < 10; ++i) {
      if (i > 0) {
        for (int32_t slot = 0; slot < 4; ++slot) group_.FeedSampled(slot);
      }
      got.push_back(group_.Run().tokens.at(2).token_id);
    }
    EXPECT_EQ(got, want);
    for (int32_t slot = 0; slot < 4; ++slot) group_.Close(slot);
  }
}

// The sampling law: a token is a function of its logits, the seed and its place in the output.
TEST_P(CpuExecutorTest, EachOutputDrawsFromAStreamOfItsOwn) {
  constexpr uint64_t kSeed = 77;
  constexpr size_t kOutputs = 12;
  group_.KeepLogits();
  step::SamplingParams params;
  params.temperature = 1.5f;
  const std::vector<int32_t> tokens =
      group_.Generate({.prompt = kPrompt, .sampling = params, .seed = kSeed, .count = kOutputs})
          .tokens;
  ASSERT_EQ(tokens.size(), kOutputs);
  for (size_t i = 0; i < kOutputs; ++i) {
    const auto position = static_cast<int32_t>(kPrompt.size() + i) - 1;
    const std::vector<float>& logits = group_.Logits(0, position);
    const uint64_t stream = sampling::OutputStream(kSeed, i);
    std::vector<double> scores;
    for (size_t id = 0; id < logits.size(); ++id) {
      scores.push_back(
          static_cast<double>(logits[id]) / 1.5 +
          sampling::GumbelFromBits(sampling::UniformBits(stream, static_cast<int32_t>(id))));
    }
    const auto best = std::max_element(scores.begin(), scores.end()) - scores.begin();
    EXPECT_EQ(tokens[i], best) << "output " << i;
  }
}

TEST_P(CpuExecutorTest, APreemptedSampledRequestGoesOnAsBefore) {
  step::SamplingParams params;
  params.frequency_penalty = 0.7f;
  params.repetition_penalty = 1.3f;
  const std::vector<int32_t> want = Generate(params, 10).tokens;
  std::vector<int32_t> history = kPrompt;
  history.insert(history.end(), want.begin(), want.begin() + 4);
  step::SlotSetup setup;
  setup.slot = 0;
  setup.seed = 11;
  setup.sampling = params;
  setup.history = history;
  setup.prompt_count = static_cast<int32_t>(kPrompt.size());
  group_.Open(setup);
  group_.Feed(0, history, 1);
  for (size_t i = 4; i < 10; ++i) {
    EXPECT_EQ(group_.Run().tokens.at(0).token_id, want[i]);
    if (i < 9) group_.FeedSampled(0);
  }
}

TEST_P(CpuExecutorTest, LogprobsAreThoseOfTheLogits) {
  std::map<int32_t, std::vector<float>> seen;  // by position
  group_.KeepLogits();
  step::SamplingParams params;
  params.logit_bias = {{.token_id = 9, .bias = 1000}};  // forces 9, and leaves logprobs alone
  group_.Open(2, kPrompt, params);
  group_.Feed(2, kPrompt, 1, 4);
  const step::StepResult result = group_.Run();
  ASSERT_EQ(result.tokens.size(), 1u);
  EXPECT_EQ(result.tokens[0].token_id, 9);
  std::vector<float> logits = group_.Logits(2, static_cast<int32_t>(kPrompt.size()) - 1);
  double total = 0;
  for (const float logit : logits) total += std::exp(static_cast<double>(logit));
  EXPECT_NEAR(result.tokens[0].logprob, static_cast<double>(logits[9]) - std::log(total), 1e-4);
  ASSERT_EQ(result.top_logprobs.size(), 4u);
  EXPECT_EQ(result.sequences[0].top_count, 4);
  std::vector<float> sorted = logits;
  std::sort(sorted.rbegin(), sorted.rend());
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(logits[static_cast<size_t>(result.top_logprobs[i].token_id)], sorted[i]);
    EXPECT_NEAR(result.top_logprobs[i].logprob, static_cast<double>(sorted[i]) - std::log(total),
                1e-4);
  }
}

TEST_P(CpuExecutorTest, StopIdsWaitForMinTokens) {
  const std::vector<int32_t> free = Generate(Greedy(), 6).tokens;
  step::SlotSetup setup;
  setup.slot = 0;
  setup.sampling = Greedy();
  setup.stop_ids = {free[0], free[1]};
  setup.min_tokens = 3;
  setup.history = kPrompt;
  setup.prompt_count = static_cast<int32_t>(kPrompt.size());
  group_.Open(setup);
  group_.Feed(0, kPrompt, 1);
  for (int i = 0; i < 3; ++i) {
    const int32_t token = group_.Run().tokens.at(0).token_id;
    EXPECT_TRUE(token != free[0] && token != free[1]) << i;
    group_.FeedSampled(0);
  }
  static_cast<void>(group_.Run());
}

TEST_P(CpuExecutorTest, MasksHereAndLateAllowOnlyTheirTokens) {
  const auto mask_of = [](std::vector<int32_t> allowed) {
    std::vector<uint32_t> words(8);
    for (const int32_t token : allowed) {
      words[static_cast<size_t>(token / 32)] |= 1u << (token % 32);
    }
    return words;
  };
  for (int32_t slot = 0; slot < 3; ++slot) {
    group_.OpenGreedy(slot, kPrompt);
    group_.Feed(slot, kPrompt, 1);
  }
  step::StepPlan& plan = group_.plan();
  plan.sequences[0].mask = step::MaskSource::kLate;
  plan.sequences[1].mask = step::MaskSource::kHere;
  plan.sequences[2].mask = step::MaskSource::kLate;
  plan.mask_stride = 8;
  plan.mask_words = mask_of({77});
  group_.Launch();
  step::MaskBatch late;
  late.step_id = 1;
  late.mask_stride = 8;
  for (const int32_t token : {200, 31}) {
    const std::vector<uint32_t> words = mask_of({token});
    late.mask_words.insert(late.mask_words.end(), words.begin(), words.end());
  }
  ASSERT_TRUE(group_.group().ProvideMasks(late).ok());
  const step::StepResult result = group_.Wait();
  EXPECT_EQ(result.tokens.at(0).token_id, 200);
  EXPECT_EQ(result.tokens.at(1).token_id, 77);
  EXPECT_EQ(result.tokens.at(2).token_id, 31);
}

TEST_P(CpuExecutorTest, RightDraftsAreTakenAndTheRestIsDropped) {
  step::SamplingParams params;
  params.temperature = 0.7f;
  params.presence_penalty = 1;  // what is drafted must count
  const std::vector<int32_t> want = Generate(params, 8).tokens;
  for (size_t right = 0; right <= 4; ++right) {
    group_.Open(0, kPrompt, params, 11);
    std::vector<int32_t> input = kPrompt;
    for (size_t i = 0; i < 4; ++i) {
      input.push_back(i < right ? want[i] : (want[i] + 1) % 256);
    }
    group_.Feed(0, input, 5);
    const step::StepResult result = group_.Run();
    ASSERT_EQ(result.sequences.at(0).token_count, static_cast<int32_t>(right) + 1);
    for (size_t i = 0; i <= right; ++i) EXPECT_EQ(result.tokens[i].token_id, want[i]);
    group_.Close(0);
  }
}

TEST_P(CpuExecutorTest, CopiedBlocksReadLikeTheirOrigin) {
  const std::vector<int32_t> prompt(40, 7);
  const std::vector<int32_t> want =
      group_.Generate({.slot = 0, .prompt = prompt, .sampling = Greedy(), .count = 5}).tokens;
  group_.OpenGreedy(0, prompt);
  group_.Feed(0, prompt, 1);
  // Slot 0 got blocks in the order in which the group hands them out; slot 1 copies all of them.
  const std::vector<int32_t> from = group_.plan().block_ids;
  static_cast<void>(group_.Run());
  group_.OpenGreedy(1, prompt);
  group_.Feed(1, prompt, 1);
  step::StepPlan& plan = group_.plan();
  for (size_t i = 0; i < from.size(); ++i) {
    plan.block_copies.push_back({.from = from[i], .to = plan.block_ids[i]});
  }
  plan.sequences[0].first_position = 39;
  plan.sequences[0].token_count = 1;
  plan.sequences[0].token_begin = 39;
  std::vector<int32_t> got = {group_.Run().tokens.at(0).token_id};
  while (got.size() < want.size()) {
    group_.FeedSampled(1);
    got.push_back(group_.Run().tokens.at(0).token_id);
  }
  EXPECT_EQ(got, want);
}

INSTANTIATE_TEST_SUITE_P(Groups, CpuExecutorTest,
                         ::testing::Values(std::tuple(1, 1), std::tuple(1, 3), std::tuple(2, 1),
                                           std::tuple(3, 2)),
                         [](const auto& test) {
                           return std::to_string(std::get<0>(test.param)) + "_ranks_" +
                                  std::to_string(std::get<1>(test.param)) + "_threads";
                         });

TEST(CpuExecutorGroupTest, RanksAndThreadsAgreeOnSampledTokens) {
  step::SamplingParams plain;
  step::SamplingParams filtered;
  filtered.typical_p = 0.9f;
  filtered.min_p = 0.01f;
  filtered.frequency_penalty = 0.3f;
  for (const step::SamplingParams& params : {plain, filtered}) {
    std::vector<int32_t> want;
    for (const auto& [ranks, threads] :
         {std::pair(1, 1), std::pair(1, 2), std::pair(2, 1), std::pair(2, 2), std::pair(3, 1)}) {
      InProcessGroup::Options options = Options(ranks, threads);
      options.memory.numerics = weights::Numerics::kExact;
      InProcessGroup group(Folder("llama-awq-gemm"), options);
      const auto got = group.Generate(
          {.prompt = kPrompt, .sampling = params, .seed = 5, .count = 20, .logprobs = 3});
      if (want.empty()) want = got.tokens;
      EXPECT_EQ(got.tokens, want) << ranks << " ranks, " << threads << " threads";
    }
  }
}

TEST(CpuExecutorErrorTest, PlansOutOfRangeAreRefused) {
  InProcessGroup group(Folder("llama"), Options());
  step::StepPlan plan;
  plan.sequences.resize(1);
  plan.sequences[0].token_count = 1;
  plan.token_ids = {1};
  EXPECT_EQ(group.group().Launch(plan).code(), absl::StatusCode::kInvalidArgument);
}

TEST(CpuExecutorErrorTest, AnEmptyStepIsAStep) {
  InProcessGroup group(Folder("llama"), Options());
  group.OpenGreedy(0, kPrompt);
  EXPECT_TRUE(group.Run().tokens.empty());
  group.Feed(0, kPrompt, 1);
  EXPECT_EQ(group.Run().tokens.size(), 1u);
}

TEST(CpuExecutorErrorTest, ALostPeerFailsTheStepAndAllAfterIt) {
  auto checkpoint = weights::Checkpoint::Open(Folder("llama"));
  ASSERT_TRUE(checkpoint.ok());
  auto region = collectives::ShmRegion::Create(2);
  ASSERT_TRUE(region.ok());
  auto alone = collectives::MakeShmCommunicator(&*region, 0, {});
  ASSERT_TRUE(alone.ok());
  const InProcessGroup::Options options = Options();
  auto plan = weights::PlanMemory(**checkpoint, 2, options.memory);
  ASSERT_TRUE(plan.ok()) << plan.status();
  auto executor = CpuExecutor::Create(
      **checkpoint, *plan, alone->get(),
      {.memory = options.memory, .threads = 2, .progress = {}, .on_progress_stamp = {}});
  ASSERT_TRUE(executor.ok()) << executor.status();
  step::StepPlan step;
  step.opened.resize(1);
  step.token_ids = {1};
  step.block_ids = {0};
  step.sequences.resize(1);
  step.sequences[0].token_count = 1;
  step.sequences[0].block_count = 1;
  ASSERT_TRUE((*executor)->Launch(step).ok());
  region->Abort();
  step::StepResult result;
  EXPECT_EQ((*executor)->Wait(Deadline::max(), &result).code(), absl::StatusCode::kAborted);
  EXPECT_EQ((*executor)->Wait(Deadline::max(), &result).code(), absl::StatusCode::kAborted);
}

TEST(CpuExecutorErrorTest, OptionsOutOfRangeAreRefused) {
  auto checkpoint = weights::Checkpoint::Open(Folder("llama"));
  ASSERT_TRUE(checkpoint.ok());
  const InProcessGroup::Options options = Options();
  auto plan = weights::PlanMemory(**checkpoint, 2, options.memory);
  ASSERT_TRUE(plan.ok());
  const auto self = collectives::MakeSelfCommunicator();
  EXPECT_EQ(CpuExecutor::Create(**checkpoint, *plan, self.get(), {.memory = options.memory})
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
  auto alone = weights::PlanMemory(**checkpoint, 1, options.memory);
  ASSERT_TRUE(alone.ok());
  EXPECT_EQ(CpuExecutor::Create(**checkpoint, *alone, self.get(),
                                {.memory = options.memory, .threads = 0})
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(CpuExecutorProgressTest, ReportsBytesAndLayers) {
  auto checkpoint = weights::Checkpoint::Open(Folder("llama"));
  ASSERT_TRUE(checkpoint.ok());
  const InProcessGroup::Options options = Options();
  auto plan = weights::PlanMemory(**checkpoint, 1, options.memory);
  ASSERT_TRUE(plan.ok());
  const auto self = collectives::MakeSelfCommunicator();
  std::vector<int64_t> done;
  int64_t total = 0;
  int stamps = 0;
  CpuExecutorOptions settings{.memory = options.memory, .progress = {}, .on_progress_stamp = {}};
  settings.progress = [&](int64_t bytes_done, int64_t bytes_total) {
    done.push_back(bytes_done);
    total = bytes_total;
  };
  settings.on_progress_stamp = [&] { ++stamps; };
  auto executor = CpuExecutor::Create(**checkpoint, *plan, self.get(), settings);
  ASSERT_TRUE(executor.ok());
  ASSERT_FALSE(done.empty());
  EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
  EXPECT_EQ(done.back(), total);
  step::StepPlan step;
  step.opened.resize(1);
  step.token_ids = {1};
  step.block_ids = {0};
  step.sequences.resize(1);
  step.sequences[0].token_count = 1;
  step.sequences[0].block_count = 1;
  ASSERT_TRUE((*executor)->Launch(step).ok());
  step::StepResult result;
  ASSERT_TRUE((*executor)->Wait(Deadline::max(), &result).ok());
  EXPECT_EQ(stamps, (*checkpoint)->spec().layer_count);
}

}  // namespace
}  // namespace nibble::execution
