#include "worker/model/model_spec.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace nibble::model {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

json Minimal(const char* architecture) {
  return {{"architectures", {architecture}}, {"hidden_size", 512}, {"intermediate_size", 1024},
          {"num_hidden_layers", 4},          {"vocab_size", 1000}, {"num_attention_heads", 32}};
}

ModelSpec Parse(const json& config) {
  auto spec = ParseModelSpec(config);
  EXPECT_TRUE(spec.ok()) << spec.status();
  return spec.ok() ? *std::move(spec) : ModelSpec{};
}

std::string Refusal(const json& config) {
  const auto spec = ParseModelSpec(config);
  EXPECT_EQ(spec.status().code(), absl::StatusCode::kInvalidArgument) << spec.status();
  return std::string(spec.status().message());
}

TEST(ModelSpecTest, TheTypeOfItsTrainingIsKnownByBothNames) {
  json config = Minimal("LlamaForCausalLM");
  EXPECT_EQ(Parse(config).stored_type, "");
  config["torch_dtype"] = "float16";
  EXPECT_EQ(Parse(config).stored_type, "float16");
  config["dtype"] = "bfloat16";
  EXPECT_EQ(Parse(config).stored_type, "bfloat16");
  config["dtype"] = nullptr;
  EXPECT_EQ(Parse(config).stored_type, "float16");
}

TEST(ModelSpecTest, FamiliesFillInWhatTheConfigLeavesOut) {
  const ModelSpec llama = Parse(Minimal("LlamaForCausalLM"));
  EXPECT_EQ(llama.family, "llama");
  EXPECT_EQ(llama.kv_head_count, 32);
  EXPECT_EQ(llama.head_dim, 16);
  EXPECT_EQ(llama.max_context, 2048);
  EXPECT_EQ(llama.norm_epsilon, 1e-6f);
  EXPECT_FALSE(llama.tied_head || llama.qkv_bias || llama.o_bias || llama.mlp_bias);

  const ModelSpec mistral = Parse(Minimal("MistralForCausalLM"));
  EXPECT_EQ(mistral.kv_head_count, 8);
  EXPECT_EQ(mistral.sliding_window, 4096);
  EXPECT_TRUE(mistral.WindowedLayer(0));

  const ModelSpec qwen2 = Parse(Minimal("Qwen2ForCausalLM"));
  EXPECT_TRUE(qwen2.qkv_bias);
  EXPECT_FALSE(qwen2.o_bias);
  EXPECT_EQ(qwen2.sliding_window, 0);
  EXPECT_EQ(qwen2.max_context, 32768);

  const ModelSpec qwen3 = Parse(Minimal("Qwen3ForCausalLM"));
  EXPECT_TRUE(qwen3.qk_norm);
  EXPECT_FALSE(qwen3.qkv_bias);
  EXPECT_EQ(qwen3.head_dim, 128);
}

TEST(ModelSpecTest, AttentionAndMlpBiasesFollowTheirKeys) {
  json config = Minimal("LlamaForCausalLM");
  config["attention_bias"] = true;
  config["mlp_bias"] = true;
  const ModelSpec spec = Parse(config);
  EXPECT_TRUE(spec.qkv_bias && spec.o_bias && spec.mlp_bias);
  config["architectures"] = {"Qwen3ForCausalLM"};
  EXPECT_TRUE(Parse(config).o_bias);
  EXPECT_FALSE(Parse(config).mlp_bias);
}

TEST(ModelSpecTest, QwenWindowsOnlyWhenSwitchedOnAndFromTheNamedLayer) {
  json config = Minimal("Qwen2ForCausalLM");
  config["sliding_window"] = 64;
  config["max_window_layers"] = 3;
  EXPECT_EQ(Parse(config).sliding_window, 0);
  config["use_sliding_window"] = true;
  const ModelSpec spec = Parse(config);
  EXPECT_EQ(spec.sliding_window, 64);
  EXPECT_FALSE(spec.WindowedLayer(2));
  EXPECT_TRUE(spec.WindowedLayer(3));
  config["max_window_layers"] = 4;
  EXPECT_EQ(Parse(config).sliding_window, 0);
  config["layer_types"] = {"sliding_attention", "full_attention", "full_attention",
                           "full_attention"};
  EXPECT_TRUE(Parse(config).WindowedLayer(0));
  EXPECT_FALSE(Parse(config).WindowedLayer(3));
  config["sliding_window"] = nullptr;
  EXPECT_EQ(Parse(config).sliding_window, 0);
}

TEST(ModelSpecTest, MistralNullWindowIsNone) {
  json config = Minimal("MistralForCausalLM");
  config["sliding_window"] = nullptr;
  EXPECT_EQ(Parse(config).sliding_window, 0);
  EXPECT_FALSE(Parse(config).WindowedLayer(0));
}

TEST(ModelSpecTest, LlamaIgnoresAWindow) {
  json config = Minimal("LlamaForCausalLM");
  config["sliding_window"] = 64;
  EXPECT_EQ(Parse(config).sliding_window, 0);
}

TEST(ModelSpecTest, ScaledPositionsReachFurther) {
  json config = Minimal("LlamaForCausalLM");
  config["max_position_embeddings"] = 4096;
  config["rope_scaling"] = {{"type", "linear"}, {"factor", 4.0}};
  EXPECT_EQ(Parse(config).max_context, 16384);
  config["rope_scaling"] = {{"type", "dynamic"}, {"factor", 4.0}};
  EXPECT_EQ(Parse(config).max_context, 4096);
  EXPECT_EQ(Parse(config).context_limit, 16384);
  config["rope_scaling"] = {{"type", "yarn"}, {"factor", 4.0}};
  EXPECT_EQ(Parse(config).max_context, 16384);
  config["rope_scaling"]["original_max_position_embeddings"] = 1024;
  EXPECT_EQ(Parse(config).max_context, 4096);
  config["rope_scaling"] = {{"type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 1},
                            {"high_freq_factor", 4},
                            {"original_max_position_embeddings", 512}};
  EXPECT_EQ(Parse(config).max_context, 4096);
  EXPECT_EQ(Parse(config).context_limit, 4096);
}

TEST(ModelSpecTest, UnknownArchitectureIsNamed) {
  const auto spec = ParseModelSpec(Minimal("GPT2LMHeadModel"));
  EXPECT_EQ(spec.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(spec.status().message()),
              AllOf(HasSubstr("GPT2LMHeadModel"), HasSubstr("Qwen3ForCausalLM")));
}

TEST(ModelSpecTest, EveryRequiredKeyIsNamedWhenMissing) {
  for (const char* key : {"architectures", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "vocab_size"}) {
    json config = Minimal("LlamaForCausalLM");
    config.erase(key);
    EXPECT_THAT(Refusal(config), AllOf(HasSubstr(key), HasSubstr("missing")));
  }
}

TEST(ModelSpecTest, BadValuesNameKeyValueAndWhatIsAllowed) {
  struct Case {
    const char* key;
    json value;
    const char* shown;
    const char* allowed;
  };
  const std::vector<Case> cases = {
      {"hidden_size", 0, "is 0", "1 … 131072"},
      {"hidden_size", -1, "is -1", "1 …"},
      {"hidden_size", 512.0, "is 512.0", "an integer"},
      {"hidden_size", "512", "is \"512\"", "an integer"},
      {"hidden_size", 18446744073709551615ull, "18446744073709551615", "an integer"},
      {"hidden_size", 4611686018427387904ll, "4611686018427387904", "an integer"},
      {"hidden_size", 500, "is 500", "a multiple of num_attention_heads, 32"},
      {"hidden_size", json::array({1}), "an array of 1", "an integer"},
      {"num_key_value_heads", 5, "is 5", "a divisor of num_attention_heads, 32"},
      {"num_key_value_heads", 64, "is 64", "1 … 32"},
      {"head_dim", 15, "is 15", "an even number"},
      {"rms_norm_eps", -1e-5, "is -1e-05", "0 … 0.1"},
      {"hidden_act", "gelu", "\"gelu\"", "silu"},
      {"tie_word_embeddings", 1, "is 1", "true, false"},
      {"architectures", json::array(), "an array of 0", "names"},
      {"rope_theta", 0, "is 0", "a number 2"},
      {"rope_scaling", 3, "is 3", "an object"},
      {"rope_scaling", {{"type", "longrope"}}, "longrope", "llama3, yarn"},
      {"rope_scaling", {{"type", "linear"}}, "factor is missing", "a number 1"},
      {"rope_scaling", {{"type", "linear"}, {"factor", 0.5}}, "is 0.5", "a number 1"},
      {"rope_scaling",
       {{"type", "llama3"}, {"factor", 8}, {"low_freq_factor", 4}, {"high_freq_factor", 4}},
       "high_freq_factor is 4",
       "more than"},
      {"partial_rotary_factor", 0.5, "is 0.5", "1"},
      {"vocab_size", 1ll << 40, "1099511627776", "1 … 4194304"},
  };
  for (const Case& bad : cases) {
    json config = Minimal("LlamaForCausalLM");
    config[bad.key] = bad.value;
    EXPECT_THAT(Refusal(config), AllOf(HasSubstr("config.json"), HasSubstr(bad.key),
                                       HasSubstr(bad.shown), HasSubstr(bad.allowed)));
  }
}

TEST(ModelSpecTest, ContradictingRopeKeysAreRefused) {
  json config = Minimal("LlamaForCausalLM");
  config["rope_scaling"] = {{"type", "linear"}, {"factor", 2.0}};
  config["rope_parameters"] = {{"rope_type", "linear"}, {"factor", 4.0}};
  EXPECT_THAT(Refusal(config), HasSubstr("rope_scaling and rope_parameters differ"));
}

TEST(ModelSpecTest, NotAnObjectIsRefused) {
  EXPECT_THAT(Refusal(json::array()), HasSubstr("not a JSON object"));
}

}  // namespace
}  // namespace nibble::model
