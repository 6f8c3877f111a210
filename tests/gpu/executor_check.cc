// Holds the GPU executor to the logits that transformers computed for one tiny checkpoint per
// architecture, and to the CPU's exact executor on a real checkpoint. Needs a GPU.
//
//   executor_check MODEL_SPECS_FOLDER [AWQ_FOLDER]
//   executor_check MODEL_SPECS_FOLDER/NAME    one of them, for tools that take long
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "nlohmann/json.hpp"
#include "tests/gpu/scaled_tensors.h"
#include "tests/gpu/sequence_driver.h"
#include "tests/support/must.h"
#include "worker/execution/cpu/local_group.h"
#include "worker/execution/cuda/activations.h"
#include "worker/execution/cuda/cuda_executor.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/rank_weights.h"

namespace nibble::gpu_check {
namespace {

using cuda::Element;
using execution::CudaExecutor;
using execution::CudaExecutorOptions;
using execution::CudaModel;
using execution::ElementWord;
using testing::Must;

constexpr Element kElements[] = {Element::kHalf, Element::kBfloat16};

using Logits = std::map<std::pair<int32_t, int32_t>, std::vector<float>>;  // by slot, position

std::unique_ptr<CudaExecutor> MakeExecutor(const weights::Checkpoint& checkpoint,
                                           int32_t max_context, Element element,
                                           const CudaExecutorOptions& options) {
  const auto shares = Must(weights::PlanShares(checkpoint, 1));
  auto model = Must(CudaModel::Load(checkpoint, shares[0], max_context, element, nullptr));
  return Must(CudaExecutor::Create(std::move(model), options));
}

template <typename AnyExecutor>
void Keep(AnyExecutor* executor, Logits* logits) {
  executor->set_logits_observer(
      [logits](int32_t slot, int32_t position, std::span<const float> row) {
        (*logits)[{slot, position}].assign(row.begin(), row.end());
      });
}

double LogSumExp(const std::vector<float>& logits) {
  const double max = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - max);
  return max + std::log(sum);
}

// What is allowed. bf16 rounds eight times as coarsely as fp16; divergence goes with the square.
// transformers itself in bf16 diverges by 2e-3 to 8e-3 on the tiny checkpoints.
struct Limits {
  double kl_mean;
  float margin;  // of the best token over the one that was taken
};
Limits LimitsOf(Element element) {
  return element == Element::kHalf ? Limits{1e-4, 0.05f} : Limits{64 * 1e-4, 8 * 0.05f};
}

struct Difference {
  const Limits limits;
  double kl_sum = 0, kl_max = 0, logit_max = 0;
  int32_t positions = 0, argmax_differs = 0, argmax_wrong = 0;
  float margin_lost = 0;

  explicit Difference(Element element) : Difference(LimitsOf(element)) {}
  explicit Difference(const Limits& allowed) : limits(allowed) {}

  void Take(const std::vector<float>& want, const std::vector<float>& got) {
    CHECK(want.size() == got.size());
    const double want_sum = LogSumExp(want), got_sum = LogSumExp(got);
    double kl = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      const double p = static_cast<double>(want[i]) - want_sum;
      kl += std::exp(p) * (p - (static_cast<double>(got[i]) - got_sum));
      const double difference =
          std::abs(static_cast<double>(want[i]) - static_cast<double>(got[i]));
      logit_max = std::isfinite(difference) ? std::max(logit_max, difference) : 1e30;
    }
    kl_sum += kl;
    kl_max = std::max(kl_max, std::isfinite(kl) ? kl : 1e30);
    ++positions;
    const auto best = std::max_element(want.begin(), want.end());
    const auto mine = std::max_element(got.begin(), got.end());
    if (best - want.begin() == mine - got.begin()) return;
    ++argmax_differs;
    const float lost = *best - want[static_cast<size_t>(mine - got.begin())];
    margin_lost = std::max(margin_lost, lost);
    if (lost > limits.margin) ++argmax_wrong;  // the other choice was clearly worse
  }
  [[nodiscard]] double kl_mean() const { return kl_sum / positions; }
  bool Report(const std::string& name) const {
    const bool ok = kl_mean() <= limits.kl_mean && argmax_wrong == 0 && logit_max < 1e9;
    std::printf(
        "%-4s %-44s %4d positions: KL mean %.2e max %.2e, logits %.2e, argmax differs %d "
        "(by %.3f), wrong %d\n",
        ok ? "ok" : "FAIL", name.c_str(), positions, kl_mean(), kl_max, logit_max, argmax_differs,
        static_cast<double>(margin_lost), argmax_wrong);
    return ok;
  }
};

// Feeds the ids `chunk` at a time, every row sampled.
void FeedAll(SequenceDriver* driver, int32_t slot, const std::vector<int32_t>& ids, int32_t chunk) {
  for (size_t begin = 0; begin < ids.size();) {
    const size_t count = std::min(static_cast<size_t>(chunk), ids.size() - begin);
    driver->Feed(slot, std::span(ids).subspan(begin, count), static_cast<int32_t>(count));
    static_cast<void>(driver->Run());
    begin += count;
  }
}

struct Expected {
  std::vector<int32_t> ids;
  std::vector<std::vector<float>> logits;  // per position
};

Expected ReadExpected(const std::string& folder) {
  auto file = Must(weights::SafetensorsFile::Open(folder + "/expected.safetensors"));
  Expected expected;
  const weights::TensorView& ids = file->tensors().at("input_ids");
  for (size_t at = 0; at < ids.data.size(); at += 8) {
    int64_t id = 0;
    std::memcpy(&id, ids.data.data() + at, sizeof(id));
    expected.ids.push_back(static_cast<int32_t>(id));
  }
  const weights::TensorView& logits = file->tensors().at("logits");
  const size_t vocab = logits.data.size() / sizeof(float) / expected.ids.size();
  for (size_t position = 0; position < expected.ids.size(); ++position) {
    expected.logits.emplace_back(vocab);
    std::memcpy(expected.logits.back().data(), logits.data.data() + position * vocab * 4,
                vocab * 4);
  }
  return expected;
}

struct SpecCase {
  std::string folder, name;
  Element element;
  bool fusion;
  int32_t chunk;
};

bool CheckSpec(const SpecCase& c, const Expected& expected) {
  const auto checkpoint = Must(weights::Checkpoint::Open(c.folder + "/" + c.name));
  const auto count = static_cast<int32_t>(expected.ids.size());
  const auto executor =
      MakeExecutor(*checkpoint, count, c.element,
                   {.max_slots = 4, .max_step_tokens = 64, .kv_blocks = 8, .fusion = c.fusion});
  Logits logits;
  Keep(executor.get(), &logits);
  SequenceDriver driver(executor.get());
  driver.OpenGreedy(3);
  FeedAll(&driver, 3, expected.ids, c.chunk);
  Difference difference(c.element);
  for (int32_t position = 0; position < count; ++position) {
    difference.Take(expected.logits[static_cast<size_t>(position)], logits.at({3, position}));
  }
  return difference.Report(c.name + " " + ElementWord(c.element) +
                           (c.fusion ? " fused" : " plain") + " by " + std::to_string(c.chunk));
}

// Prompts of which no row is sampled at first and then the last few: those alone go through all of
// the last layer.
bool CheckLastRows(const std::string& folder, Element element, const Expected& expected) {
  const auto checkpoint = Must(weights::Checkpoint::Open(folder));
  const auto count = static_cast<int32_t>(expected.ids.size());
  Difference difference(element);
  bool only_those = true;
  for (const auto& [behind, rows] : {std::pair{0, 1}, {17, 3}, {30, 8}}) {
    const auto executor =
        MakeExecutor(*checkpoint, count, element,
                     {.max_slots = 4, .max_step_tokens = 64, .kv_blocks = 8, .fusion = true});
    Logits logits;
    Keep(executor.get(), &logits);
    SequenceDriver driver(executor.get());
    driver.OpenGreedy(1);
    const std::span<const int32_t> ids(expected.ids);
    if (behind > 0) {
      driver.Feed(1, ids.first(static_cast<size_t>(behind)), 0);
      static_cast<void>(driver.Run());
    }
    driver.Feed(1, ids.subspan(static_cast<size_t>(behind)), rows);
    static_cast<void>(driver.Run());
    for (int32_t position = count - rows; position < count; ++position) {
      difference.Take(expected.logits[static_cast<size_t>(position)], logits.at({1, position}));
    }
    only_those = only_those && logits.size() == static_cast<size_t>(rows);
  }
  return difference.Report(std::filesystem::path(folder).filename().string() + " " +
                           ElementWord(element) + " last rows") &&
         only_those;
}

// A model whose SiLU·mul is beyond fp16, by factors that cancel out: fp16 ends the sequence, bf16
// computes what transformers does from the model without them.
bool CheckOverflow(const std::string& folder) {
  constexpr float kFactor = 1 << 14;
  const Expected expected = ReadExpected(folder + "/llama");
  const std::string scaled = std::filesystem::temp_directory_path() / "executor_check_scaled";
  std::filesystem::remove_all(scaled);
  std::filesystem::create_directory(scaled);
  std::filesystem::copy(folder + "/llama/config.json", scaled);
  WriteScaled(folder + "/llama/model.safetensors", scaled + "/model.safetensors",
              {{"up_proj.weight", kFactor}, {"down_proj.weight", 1 / kFactor}});
  const auto checkpoint = Must(weights::Checkpoint::Open(scaled));
  bool ok = true;
  for (const bool fusion : {false, true}) {
    for (const int32_t chunk : {48, 7, 1}) {
      ok = CheckSpec({scaled, "", Element::kBfloat16, fusion, chunk}, expected) && ok;
    }
    const auto executor =
        MakeExecutor(*checkpoint, static_cast<int32_t>(expected.ids.size()), Element::kHalf,
                     {.max_slots = 4, .max_step_tokens = 64, .kv_blocks = 8, .fusion = fusion});
    SequenceDriver driver(executor.get());
    driver.OpenGreedy(0);
    driver.Feed(0, expected.ids, 1);
    const bool ended = driver.Run().sequences.at(0).non_finite;
    std::printf("%-4s beyond fp16: %s\n", ended ? "ok" : "FAIL",
                ended ? "the sequence ends" : "nobody noticed");
    ok = ended && ok;
  }
  std::filesystem::remove_all(scaled);
  return ok;
}

// A model of which every product of a step of 9 to 16 sequences takes fixed point.
model::ModelSpec FixedSpec(int32_t kv_heads) {
  model::ModelSpec spec;
  spec.family = "llama";
  spec.architecture = "LlamaForCausalLM";
  spec.hidden_size = 1024;
  spec.ffn_size = 8704;
  spec.layer_count = 3;
  spec.head_count = 8;
  spec.kv_head_count = kv_heads;
  spec.head_dim = 128;
  spec.vocab_size = 1000;
  spec.max_context = spec.context_limit = 1024;
  return spec;
}

std::unique_ptr<CudaExecutor> RandomExecutor(const model::ModelSpec& spec, bool fusion) {
  const auto shares = Must(weights::ComputeShares(spec, 1, 128));
  auto model = Must(CudaModel::Random(spec, shares[0], 128, spec.max_context, Element::kHalf));
  return Must(CudaExecutor::Create(
      std::move(model),
      {.max_slots = 16, .max_step_tokens = 512, .kv_blocks = 1024, .fusion = fusion}));
}

// Logits of steps of one token a sequence, behind prompts of several lengths; the same inputs
// whatever comes out.
Logits DecodeSteps(const model::ModelSpec& spec, int32_t sequences, bool fusion) {
  const auto executor = RandomExecutor(spec, fusion);
  Logits logits;
  SequenceDriver driver(executor.get());
  for (int32_t slot = 0; slot < sequences; ++slot) {
    std::vector<int32_t> prompt;
    const int32_t length = slot == 3 ? 900 : 5 + 23 * slot;  // one has its KV blocks in parts
    for (int32_t i = 0; i < length; ++i) prompt.push_back((i * 7 + slot * 131) % spec.vocab_size);
    driver.OpenGreedy(slot);
    FeedAll(&driver, slot, prompt, 256);
  }
  Keep(executor.get(), &logits);
  for (int32_t step = 0; step < 8; ++step) {
    for (int32_t slot = 0; slot < sequences; ++slot) {
      const int32_t token = (step * 37 + slot * 11) % spec.vocab_size;
      driver.Feed(slot, std::span(&token, 1), 1);
    }
    static_cast<void>(driver.Run());
  }
  return logits;
}

bool CheckFixedSteps() {
  bool ok = true;
  for (const auto& [kv_heads, sequences] : {std::pair{2, 16}, {1, 9}, {8, 13}}) {
    const model::ModelSpec spec = FixedSpec(kv_heads);
    const Logits want = DecodeSteps(spec, sequences, false);
    const Logits got = DecodeSteps(spec, sequences, true);
    // Measured: 6e-7. A wrong number somewhere diverges by far more.
    Difference difference(Limits{1e-5, 0.05f});
    for (const auto& [place, row] : want) difference.Take(row, got.at(place));
    ok = difference.Report("fused against plain, " + std::to_string(sequences) + " sequences, " +
                           std::to_string(kv_heads) + " KV heads") &&
         want.size() == got.size() && ok;
  }
  return ok;
}

// Prompts whose steps have tiles of 16, 96 and 128 tokens, two of the latter: the same bits each
// time, as no sum's order is left to chance.
bool CheckRepeats() {
  const model::ModelSpec spec = FixedSpec(2);
  bool ok = true;
  for (const int32_t length : {9, 143, 250}) {
    std::vector<int32_t> prompt;
    for (int32_t i = 0; i < length; ++i) prompt.push_back((i * 7 + length) % spec.vocab_size);
    std::vector<Logits> runs;
    for (int32_t run = 0; run < 4; ++run) {
      const auto executor = RandomExecutor(spec, true);
      runs.emplace_back();
      Keep(executor.get(), &runs.back());
      SequenceDriver driver(executor.get());
      driver.OpenGreedy(0);
      FeedAll(&driver, 0, prompt, length);
    }
    bool same = true;
    for (const Logits& run : runs) same = same && run == runs.front();
    std::printf("%-4s a prompt of %d tokens, four times: %s\n", same ? "ok" : "FAIL", length,
                same ? "the same bits" : "not the same");
    ok = same && ok;
  }
  return ok;
}

struct Golden {
  std::string name;
  std::vector<int32_t> prompt, generated;
};

std::vector<Golden> ReadGoldens(const std::string& folder) {
  std::ifstream stream(folder + "/goldens.json");
  CHECK_MSG(stream.good(), folder);
  std::vector<Golden> goldens;
  const nlohmann::json file = nlohmann::json::parse(stream);
  for (const auto& entry : file.at("prompts")) {
    goldens.push_back({entry.at("name").get<std::string>(),
                       entry.at("prompt_token_ids").get<std::vector<int32_t>>(),
                       entry.at("generated_token_ids").get<std::vector<int32_t>>()});
  }
  return goldens;
}

// The golden continuations, teacher-forced, on any executor.
template <typename AnyExecutor>
Logits TeacherForced(AnyExecutor* executor, step::Executor* steps,
                     const std::vector<Golden>& goldens, int32_t chunk) {
  Logits logits;
  Keep(executor, &logits);
  SequenceDriver driver(steps);
  for (size_t i = 0; i < goldens.size(); ++i) {
    std::vector<int32_t> ids = goldens[i].prompt;
    ids.insert(ids.end(), goldens[i].generated.begin(), goldens[i].generated.end());
    driver.OpenGreedy(static_cast<int32_t>(i));
    FeedAll(&driver, static_cast<int32_t>(i), ids, chunk);
    driver.Close(static_cast<int32_t>(i));
  }
  static_cast<void>(driver.Run());
  executor->set_logits_observer(nullptr);
  return logits;
}

// All prompts side by side, tokens fed back on the device, one step ahead; how many of the golden
// tokens come out before the first that differs.
void Generate(CudaExecutor* executor, const std::vector<Golden>& goldens, const char* name) {
  SequenceDriver driver(executor);
  const auto count = static_cast<int32_t>(goldens.size());
  std::vector<std::vector<int32_t>> tokens(goldens.size());
  const auto take = [&] {
    const step::StepResult result = driver.Wait();
    for (size_t i = 0; i < goldens.size(); ++i) tokens[i].push_back(result.tokens[i].token_id);
  };
  for (int32_t slot = 0; slot < count; ++slot) {
    const Golden& golden = goldens[static_cast<size_t>(slot)];
    driver.OpenGreedy(slot, golden.prompt);
    driver.Feed(slot, golden.prompt, 1);
  }
  driver.Launch();
  for (size_t step = 1; step < goldens[0].generated.size(); ++step) {
    for (int32_t slot = 0; slot < count; ++slot) driver.FeedSampled(slot);
    driver.Launch();
    take();
  }
  take();
  for (size_t i = 0; i < goldens.size(); ++i) {
    const auto& want = goldens[i].generated;
    const auto same =
        std::mismatch(want.begin(), want.end(), tokens[i].begin()).first - want.begin();
    std::printf("     %s %-12s %td of %zu greedy tokens before the first that differs\n", name,
                goldens[i].name.c_str(), same, want.size());
  }
  for (int32_t slot = 0; slot < count; ++slot) driver.Close(slot);
  static_cast<void>(driver.Run());
}

// The same requests sampled within the step's graph and, because they ask for logprobs, behind it:
// the same tokens.
bool CheckSampling(CudaExecutor* executor, const std::vector<int32_t>& prompt) {
  std::vector<std::vector<int32_t>> runs;
  for (const int32_t logprobs : {-1, 0}) {
    SequenceDriver driver(executor);
    driver.Open(1, prompt, {.temperature = 0.8f}, 42);
    driver.Feed(1, prompt, 1, logprobs);
    driver.Launch();
    runs.emplace_back();
    for (int32_t i = 0; i < 40; ++i) {
      driver.FeedSampled(1, logprobs);
      driver.Launch();
      runs.back().push_back(driver.Wait().tokens.at(0).token_id);
    }
    runs.back().push_back(driver.Wait().tokens.at(0).token_id);
    driver.Close(1);
    static_cast<void>(driver.Run());
  }
  const bool ok = runs[0] == runs[1];
  std::printf("%-4s sampling within a graph and behind it: the same %zu tokens\n",
              ok ? "ok" : "FAIL", runs[0].size());
  return ok;
}

bool CheckCheckpoint(const std::string& folder, Element element) {
  const auto checkpoint = Must(weights::Checkpoint::Open(folder));
  const std::vector<Golden> goldens = ReadGoldens(folder);
  constexpr int32_t kContext = 1024;
  weights::MemoryOptions memory{.numerics = weights::Numerics::kExact,
                                .max_slots = 16,
                                .max_step_tokens = 512,
                                .max_context = kContext};
  auto group = Must(
      execution::LocalGroup::Create(*checkpoint, {.ranks = 1, .memory = memory, .threads = 8}));
  const Logits want = TeacherForced(&group->rank(0), group.get(), goldens, 200);
  bool ok = true;
  for (const bool fusion : {false, true}) {
    const auto executor = MakeExecutor(
        *checkpoint, kContext, element,
        {.max_slots = 16, .max_step_tokens = 512, .kv_blocks = 1024, .fusion = fusion});
    for (const int32_t chunk : {200, 13, 1}) {
      if (chunk == 1 && !fusion) continue;
      const Logits got = TeacherForced(executor.get(), executor.get(), goldens, chunk);
      Difference difference(element);
      for (const auto& [place, row] : want) difference.Take(row, got.at(place));
      ok = difference.Report(std::string("SmolLM2 AWQ ") + ElementWord(element) +
                             (fusion ? " fused" : " plain") + " by " + std::to_string(chunk)) &&
           ok;
    }
    Generate(executor.get(), goldens, fusion ? "fused" : "plain");
    ok = CheckSampling(executor.get(), goldens[0].prompt) && ok;
  }
  return ok;
}

}  // namespace
}  // namespace nibble::gpu_check

int main(int argc, char** argv) {
  using namespace nibble::gpu_check;
  if (argc < 2) {
    std::fprintf(stderr, "usage: executor_check MODEL_SPECS_FOLDER[/NAME] [AWQ_FOLDER]\n");
    return 2;
  }
  const std::filesystem::path specs = argv[1];
  const bool one = std::filesystem::exists(specs / "config.json");
  const std::string folder = one ? specs.parent_path() : specs;
  bool ok = true;
  for (const char* name : {"llama", "llama-rope-llama3", "llama-rope-linear", "llama-rope-dynamic",
                           "llama-rope-yarn", "llama-biases", "mistral-window", "qwen2",
                           "qwen2-window", "qwen3", "llama-awq-gemm", "qwen2-awq-quantized-head"}) {
    if (one && specs.filename() != name) continue;
    const Expected expected = ReadExpected(folder + "/" + name);
    for (const Element element : kElements) {
      for (const bool fusion : {false, true}) {
        for (const int32_t chunk : {48, 7, 1}) {
          ok = CheckSpec({folder, name, element, fusion, chunk}, expected) && ok;
        }
        if (fusion) ok = CheckLastRows(folder + "/" + name, element, expected) && ok;
      }
    }
  }
  ok = (one || CheckOverflow(folder)) && ok;
  ok = (one || CheckFixedSteps()) && ok;
  ok = (one || CheckRepeats()) && ok;
  for (const Element element : kElements) {
    if (argc > 2) ok = CheckCheckpoint(argv[2], element) && ok;
  }
  std::printf("%s\n", ok ? "all checks passed" : "CHECKS FAILED");
  return ok ? 0 : 1;
}
