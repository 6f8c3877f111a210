// The invariance law: a request's logits do not depend on the batch, the chunks, preemption, the
// threads or the instruction set, bit for bit, in every numerics.
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/integration/execution/smollm2.h"
#include "tests/support/in_process_group.h"

namespace nibble {
namespace {

using testing::InProcessGroup;
using weights::Numerics;

constexpr int32_t kOutputs = 6;
constexpr int32_t kSlot = 5;

std::vector<int32_t> RandomTokens(int32_t count, int32_t vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < count; ++i) {
    tokens.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(vocab)));
  }
  return tokens;
}

// Logits of each output, in order.
using Trace = std::vector<std::vector<float>>;

void ExpectSameBits(const Trace& got, const Trace& want, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  for (size_t i = 0; i < want.size(); ++i) {
    ASSERT_EQ(got[i].size(), want[i].size());
    EXPECT_EQ(0, std::memcmp(got[i].data(), want[i].data(), want[i].size() * sizeof(float)))
        << what << ", output " << i;
  }
}

int32_t Size(const std::vector<int32_t>& tokens) { return static_cast<int32_t>(tokens.size()); }

// Generates kOutputs tokens greedily in kSlot, `chunk` prompt tokens a step, with `others` further
// sequences of other lengths around it.
Trace Generate(InProcessGroup* group, const std::vector<int32_t>& prompt, int32_t chunk,
               int32_t others) {
  const int32_t vocab = group->group().limits().vocab_size;
  for (int32_t i = 0; i < others; ++i) {
    const int32_t slot = i < kSlot ? i : i + 1;
    const auto other = RandomTokens(1 + i * 5 % 23, vocab, static_cast<uint32_t>(i) + 100);
    group->OpenGreedy(slot, other);
    group->Prefill(slot, other, 9);
    group->Feed(slot, std::span(other).last(1), 1);
  }
  group->OpenGreedy(kSlot, prompt);
  Trace trace;
  const auto decode_others = [&] {
    for (int32_t i = 0; i < others; ++i) group->FeedSampled(i < kSlot ? i : i + 1);
  };
  int32_t position = 0;
  for (; position + chunk < Size(prompt); position += chunk) {
    group->Feed(
        kSlot, std::span(prompt).subspan(static_cast<size_t>(position), static_cast<size_t>(chunk)),
        0);
    static_cast<void>(group->Run());
    decode_others();
  }
  group->Feed(kSlot, std::span(prompt).subspan(static_cast<size_t>(position)), 1);
  for (int32_t output = 0; output < kOutputs; ++output) {
    if (output > 0) {
      decode_others();
      group->FeedSampled(kSlot);
    }
    static_cast<void>(group->Run());
    trace.push_back(group->Logits(kSlot, Size(prompt) - 1 + output));
  }
  for (int32_t i = 0; i < others; ++i) group->Close(i < kSlot ? i : i + 1);
  group->Close(kSlot);
  return trace;
}

// Loses its slot and blocks after half of the outputs, and recomputes prompt and outputs.
Trace GeneratePreempted(InProcessGroup* group, const std::vector<int32_t>& prompt, int32_t chunk) {
  Trace trace;
  std::vector<int32_t> history = prompt;
  group->OpenGreedy(kSlot, prompt);
  group->Feed(kSlot, prompt, 1);
  for (int32_t output = 0; output < kOutputs; ++output) {
    if (output == kOutputs / 2) {
      group->Close(kSlot);
      group->OpenGreedy(0, RandomTokens(40, group->group().limits().vocab_size, 7));
      group->Feed(0, RandomTokens(40, group->group().limits().vocab_size, 7), 1);
      static_cast<void>(group->Run());
      step::SlotSetup setup;
      setup.slot = kSlot;
      setup.sampling.temperature = 0;
      setup.history = history;
      setup.prompt_count = Size(prompt);
      group->Open(setup);
      group->Prefill(kSlot, history, chunk);
      group->Feed(kSlot, std::span(history).last(1), 1);
    } else if (output > 0) {
      group->FeedSampled(kSlot);
    }
    const step::StepResult result = group->Run();
    history.push_back(result.tokens.back().token_id);
    trace.push_back(group->Logits(kSlot, Size(prompt) - 1 + output));
  }
  group->Close(0);
  group->Close(kSlot);
  return trace;
}

struct Mode {
  const char* name;
  Numerics numerics;
  weights::HeadFormat head;
};
constexpr Mode kModes[] = {{"exact", Numerics::kExact, weights::HeadFormat::kStored},
                           {"fast", Numerics::kFast, weights::HeadFormat::kInt8},
                           {"fast, stored head", Numerics::kFast, weights::HeadFormat::kStored}};

InProcessGroup::Options Options(const Mode& mode, int32_t context, int32_t threads,
                                cpu::IsaLevel isa) {
  return {.ranks = 1,
          .memory = {.numerics = mode.numerics,
                     .head = mode.head,
                     .max_slots = 17,
                     .max_step_tokens = 256,
                     .max_context = context},
          .threads = threads,
          .isa = isa};
}

void ExpectInvariant(const weights::Checkpoint& checkpoint, const InProcessGroup::Options& options,
                     const std::vector<int32_t>& prompt, const Trace& want,
                     const std::string& what) {
  InProcessGroup group(checkpoint, options);
  group.KeepLogits();
  ExpectSameBits(Generate(&group, prompt, 256, 0), want, what + ", alone");
  ExpectSameBits(Generate(&group, prompt, 256, 16), want, what + ", in a batch of 17");
  ExpectSameBits(Generate(&group, prompt, 7, 3), want, what + ", in chunks of 7");
  ExpectSameBits(Generate(&group, prompt, 1, 0), want, what + ", token by token");
  ExpectSameBits(GeneratePreempted(&group, prompt, 11), want, what + ", preempted");
}

class InvarianceTest : public ::testing::TestWithParam<const char*> {};

// Tiny models: every level that this CPU has, several thread counts.
TEST_P(InvarianceTest, EveryWayGivesTheSameBits) {
  const std::string folder = testing::SourceDir() + "/tests/data/model-specs/" + GetParam();
  auto checkpoint = weights::Checkpoint::Open(folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  // Longer than an attention tile, and than the sliding windows.
  const auto context = std::min<int32_t>((*checkpoint)->spec().max_context, 100);
  const auto prompt =
      RandomTokens(std::min(70, context - kOutputs), (*checkpoint)->spec().vocab_size, 1);
  for (const Mode& mode : kModes) {
    Trace want;
    {
      InProcessGroup reference(**checkpoint, Options(mode, context, 1, cpu::IsaLevel::kReference));
      reference.KeepLogits();
      want = Generate(&reference, prompt, 256, 0);
    }
    for (const cpu::IsaLevel isa : {cpu::IsaLevel::kReference, cpu::IsaLevel::kAvx2,
                                    cpu::IsaLevel::kAvx512Vnni, cpu::IsaLevel::kAmx}) {
      if (!cpu::IsaLevelSupported(isa)) continue;
      for (const int32_t threads : {1, 2, 3}) {
        ExpectInvariant(**checkpoint, Options(mode, context, threads, isa), prompt, want,
                        std::string(cpu::IsaLevelName(isa)) + ", " + std::to_string(threads) +
                            " threads, " + mode.name);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Models, InvarianceTest,
                         ::testing::Values("llama", "mistral-window", "qwen2-window", "qwen3",
                                           "llama-awq-gemm", "qwen2-awq-quantized-head"),
                         [](const auto& test) {
                           std::string name = test.param;
                           for (char& c : name) c = c == '-' ? '_' : c;
                           return name;
                         });

// Several ranks, uneven shares: their sums are taken in rank order, so the law holds among them.
TEST(RanksInvarianceTest, EveryWayGivesTheSameBits) {
  auto checkpoint =
      weights::Checkpoint::Open(testing::SourceDir() + "/tests/data/model-specs/llama-awq-gemm");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto prompt = RandomTokens(70, (*checkpoint)->spec().vocab_size, 1);
  for (const Mode& mode : kModes) {
    for (const int32_t ranks : {2, 3}) {
      InProcessGroup::Options options = Options(mode, 100, 1, cpu::BestIsaLevel());
      options.ranks = ranks;
      Trace want;
      {
        InProcessGroup first(**checkpoint, options);
        first.KeepLogits();
        want = Generate(&first, prompt, 256, 0);
      }
      options.threads = 2;
      ExpectInvariant(**checkpoint, options, prompt, want,
                      std::to_string(ranks) + " ranks, " + mode.name);
    }
  }
}

// The real checkpoint, with the levels that are fast enough.
TEST(RealModelInvarianceTest, EveryWayGivesTheSameBits) {
  const weights::Checkpoint* checkpoint = testing::SmolCheckpoint("RealModelInvarianceTest");
  if (checkpoint == nullptr) return;
  const auto prompt = RandomTokens(90, checkpoint->spec().vocab_size, 3);
  for (const Mode& mode : kModes) {
    Trace want;
    for (const cpu::IsaLevel isa : {cpu::IsaLevel::kAvx2, cpu::IsaLevel::kAvx512Vnni}) {
      if (!cpu::IsaLevelSupported(isa)) continue;
      const InProcessGroup::Options options = Options(mode, 160, 2, isa);
      if (want.empty()) {
        InProcessGroup first(*checkpoint, options);
        first.KeepLogits();
        want = Generate(&first, prompt, 256, 0);
      }
      ExpectInvariant(*checkpoint, options, prompt, want,
                      std::string(cpu::IsaLevelName(isa)) + ", " + mode.name);
    }
  }
}

}  // namespace
}  // namespace nibble
