// One tiny checkpoint per architecture and variant: the logits that transformers computed for it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tests/support/in_process_group.h"
#include "tests/support/test_data.h"
#include "worker/weights/safetensors.h"

namespace nibble {
namespace {

using testing::InProcessGroup;

struct Expected {
  std::vector<int32_t> input_ids;
  std::vector<float> logits;  // [input_ids, vocab]
};

Expected ReadExpected(const std::string& folder) {
  auto file = weights::SafetensorsFile::Open(folder + "/expected.safetensors");
  EXPECT_TRUE(file.ok()) << file.status();
  Expected expected;
  const weights::TensorView& ids = (*file)->tensors().at("input_ids");
  for (size_t at = 0; at < ids.data.size(); at += 8) {
    int64_t id = 0;
    std::memcpy(&id, ids.data.data() + at, sizeof(id));
    expected.input_ids.push_back(static_cast<int32_t>(id));
  }
  const weights::TensorView& logits = (*file)->tensors().at("logits");
  expected.logits.resize(logits.data.size() / sizeof(float));
  std::memcpy(expected.logits.data(), logits.data.data(), logits.data.size());
  return expected;
}

class ModelSpecsTest : public ::testing::TestWithParam<std::tuple<const char*, int32_t>> {};

TEST_P(ModelSpecsTest, GivesTheLogitsOfTransformers) {
  const auto [name, ranks] = GetParam();
  const std::string folder = testing::SourceDir() + "/tests/data/model-specs/" + name;
  const Expected expected = ReadExpected(folder);
  const auto count = static_cast<int32_t>(expected.input_ids.size());
  InProcessGroup group(
      folder,
      {.ranks = ranks, .memory = {.numerics = weights::Numerics::kExact, .max_context = count}});
  group.KeepLogits();
  group.OpenGreedy(3);
  group.Feed(3, expected.input_ids, count);
  static_cast<void>(group.Run());
  const auto vocab = static_cast<size_t>(group.group().limits().vocab_size);
  float largest = 0;
  for (int32_t position = 0; position < count; ++position) {
    const std::vector<float>& got = group.Logits(3, position);
    ASSERT_EQ(got.size(), vocab);
    for (size_t i = 0; i < vocab; ++i) {
      const float want = expected.logits[static_cast<size_t>(position) * vocab + i];
      largest = std::max(largest, std::abs(got[i] - want));
    }
  }
  EXPECT_LT(largest, 2e-3f);
}

// Every degree up to 4 at which the quantized o_proj's groups of 32 can be cut at the heads.
std::vector<std::tuple<const char*, int32_t>> RowsAndRanks() {
  std::vector<std::tuple<const char*, int32_t>> all;
  for (const auto& [name, ranks_max] :
       std::vector<std::pair<const char*, int32_t>>{{"llama", 4},
                                                    {"llama-rope-llama3", 4},
                                                    {"llama-rope-linear", 4},
                                                    {"llama-rope-dynamic", 4},
                                                    {"llama-rope-yarn", 4},
                                                    {"llama-biases", 4},
                                                    {"mistral-window", 4},
                                                    {"qwen2", 4},
                                                    {"qwen2-window", 4},
                                                    {"qwen3", 4},
                                                    {"llama-awq-gemm", 3},
                                                    {"qwen2-awq-quantized-head", 2}}) {
    for (int32_t ranks = 1; ranks <= ranks_max; ++ranks) all.emplace_back(name, ranks);
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Rows, ModelSpecsTest, ::testing::ValuesIn(RowsAndRanks()),
                         [](const auto& test) {
                           std::string name = std::get<0>(test.param);
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name + "_tp" + std::to_string(std::get<1>(test.param));
                         });

}  // namespace
}  // namespace nibble
