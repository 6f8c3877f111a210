// Inverse frequencies against those that transformers 5.23.0 (torch 2.15.0) computes.
#include <array>
#include <string_view>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "worker/model/model_spec.h"

namespace nibble::model {
namespace {

struct Frequency {
  int32_t index;
  float value;
};

struct Expected {
  std::string_view name;
  int32_t hidden_size;
  int32_t heads;
  int32_t max_position;
  float theta;
  std::string_view scaling;
  int32_t positions;
  float attention_factor;
  std::array<Frequency, 6> frequencies;
};

constexpr std::string_view kLlama3 =
    R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})";
constexpr std::string_view kYarn =
    R"({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})";
constexpr std::string_view kYarnOptions =
    R"({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        "mscale": 0.707, "mscale_all_dim": 1.0, "truncate": false, "beta_fast": 16.0})";

// clang-format off
constexpr Expected kTable[] = {
    {"plain", 4096, 32, 2048, 1e4f, "null", 2048, 1,
     {{{1, 0.865964353f}, {16, 0.100000001f}, {29, 0.0153992651f}, {32, 0.00999999978f},
       {35, 0.00649381662f}, {63, 0.000115478193f}}}},
    {"llama3", 4096, 32, 131072, 5e5f, kLlama3, 131072, 1,
     {{{1, 0.814617217f}, {16, 0.0376060307f}, {29, 0.00216657063f}, {32, 0.000524846022f},
       {35, 9.55621217e-05f}, {63, 3.06892588e-07f}}}},
    {"linear", 4096, 32, 4096, 1e4f, R"({"type": "linear", "factor": 4.0})", 4096, 1,
     {{{1, 0.216491088f}, {16, 0.0250000004f}, {29, 0.00384981628f}, {32, 0.00249999994f},
       {35, 0.00162345415f}, {63, 2.88695483e-05f}}}},
    {"dynamic", 4096, 32, 4096, 1e4f, R"({"type": "dynamic", "factor": 2.0})", 8192, 1,
     {{{1, 0.850994289f}, {16, 0.0756530315f}, {29, 0.00928694289f}, {32, 0.00572338188f},
       {35, 0.00352722057f}, {63, 3.84927334e-05f}}}},
    {"dynamic within the original length", 4096, 32, 4096, 1e4f,
     R"({"type": "dynamic", "factor": 2.0})", 4096, 1,
     {{{1, 0.865964353f}, {16, 0.100000001f}, {29, 0.0153992651f}, {32, 0.00999999978f},
       {35, 0.00649381662f}, {63, 0.000115478193f}}}},
    {"yarn", 3584, 28, 32768, 1e6f, kYarn, 131072, 1.13862944f,
     {{{1, 0.805842221f}, {16, 0.0316227786f}, {29, 0.00140511245f}, {32, 0.000602941145f},
       {35, 0.000246258394f}, {63, 3.10234441e-07f}}}},
    {"yarn with every option", 3584, 28, 32768, 1e6f, kYarnOptions, 131072, 0.964326915f,
     {{{1, 0.805842221f}, {16, 0.0316227786f}, {29, 0.00166623562f}, {32, 0.000696759962f},
       {35, 0.000272942416f}, {63, 3.10234441e-07f}}}},
};
// clang-format on

nlohmann::json Config(const Expected& expected) {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", expected.hidden_size},
          {"intermediate_size", 128},
          {"num_hidden_layers", 1},
          {"num_attention_heads", expected.heads},
          {"vocab_size", 256},
          {"max_position_embeddings", expected.max_position},
          {"rope_theta", expected.theta}};
}

void ExpectTable(const Expected& expected, const nlohmann::json& config) {
  SCOPED_TRACE(expected.name);
  const auto spec = ParseModelSpec(config);
  ASSERT_TRUE(spec.ok()) << spec.status();
  const RopeTable table = MakeRopeTable(spec->rope, spec->head_dim, expected.positions);
  ASSERT_EQ(table.inverse_frequencies.size(), 64u);
  EXPECT_FLOAT_EQ(table.attention_factor, expected.attention_factor);
  EXPECT_EQ(table.inverse_frequencies[0], expected.name == "linear" ? 0.25f : 1.0f);
  for (const auto& [index, frequency] : expected.frequencies) {
    EXPECT_NEAR(table.inverse_frequencies[index], frequency, frequency * 4e-7) << index;
  }
}

TEST(RopeTest, FrequenciesAreThoseOfTransformers) {
  for (const Expected& expected : kTable) {
    nlohmann::json config = Config(expected);
    config["rope_scaling"] = nlohmann::json::parse(expected.scaling);
    ExpectTable(expected, config);
  }
}

TEST(RopeTest, NewerRopeParametersSayTheSame) {
  for (const Expected& expected : kTable) {
    nlohmann::json config = Config(expected);
    nlohmann::json parameters = nlohmann::json::parse(expected.scaling);
    if (parameters.is_null()) parameters = {{"rope_type", "default"}};
    parameters["rope_theta"] = expected.theta;
    config.erase("rope_theta");
    config["rope_parameters"] = parameters;
    ExpectTable(expected, config);
  }
}

}  // namespace
}  // namespace nibble::model
