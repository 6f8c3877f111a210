#include "worker/weights/quantization_config.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace nibble::weights {
namespace {

using nlohmann::json;
using namespace nlohmann::literals;
using ::testing::AllOf;
using ::testing::HasSubstr;

QuantizationConfig Parse(const json& quantization, const json& side_file = nullptr) {
  json config = json::object();
  if (!quantization.is_null()) config["quantization_config"] = quantization;
  auto parsed = ParseQuantizationConfig(config, side_file);
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return parsed.ok() ? *std::move(parsed) : QuantizationConfig{};
}

std::string Refusal(const json& quantization, const json& side_file = nullptr) {
  json config = json::object();
  if (!quantization.is_null()) config["quantization_config"] = quantization;
  const auto parsed = ParseQuantizationConfig(config, side_file);
  EXPECT_FALSE(parsed.ok());
  return parsed.status().ToString();
}

TEST(QuantizationConfigTest, NothingSaidIsNothingQuantized) {
  EXPECT_EQ(Parse(nullptr).layout, Layout::kNone);
}

TEST(QuantizationConfigTest, AwqVersionsAndTheirSpellings) {
  const struct {
    json config;
    Layout layout;
  } cases[] = {
      {{{"quant_method", "awq"}}, Layout::kGemm},
      {{{"quant_method", "AWQ"}, {"version", "GEMM"}}, Layout::kGemm},
      {{{"quant_method", "awq"}, {"version", "exllama"}}, Layout::kGemm},
      {{{"quant_method", "awq"}, {"version", "ipex"}}, Layout::kGemm},
      {{{"quant_method", "awq"}, {"version", "gemv"}}, Layout::kGemv},
      {{{"quant_method", "awq"}, {"format", "gemv_fast"}}, Layout::kGemvFast},
      {{{"quant_method", "awq"}, {"checkpoint_format", "marlin"}, {"sym", true}}, Layout::kMarlin},
      {{{"quant_method", "awq"}, {"version", "gemm"}, {"backend", "llm-awq"}}, Layout::kLlmAwq},
  };
  for (const auto& entry : cases) EXPECT_EQ(Parse(entry.config).layout, entry.layout);
}

// nibble fuses whether or not the file asks for it, and takes the shapes from config.json.
TEST(QuantizationConfigTest, WhatIsForFusedModulesOfOtherProgramsIsNotRead) {
  const json plain = {{"quant_method", "awq"}, {"bits", 4}, {"group_size", 64}};
  json fused = plain;
  fused["do_fuse"] = true;
  fused["fuse_max_seq_len"] = 512;
  fused["modules_to_fuse"] = {
      {"attention", {"q_proj", "k_proj", "v_proj", "o_proj"}},
      {"mlp", {"gate_proj", "up_proj", "down_proj"}},
      {"layernorm", {"input_layernorm", "post_attention_layernorm", "norm"}},
      {"hidden_size", 1},
      {"num_attention_heads", 1},
      {"num_key_value_heads", 1},
      {"use_alibi", true}};
  for (const json& config : {plain, fused, json(fused).patch(R"([
         {"op": "replace", "path": "/modules_to_fuse", "value": 7}])"_json)}) {
    const QuantizationConfig read = Parse(config);
    EXPECT_EQ(read.layout, Layout::kGemm);
    EXPECT_EQ(read.group_size, 64);
    EXPECT_EQ(read.modules_to_not_convert, std::vector<std::string>{});
  }
}

TEST(QuantizationConfigTest, OldKeysAndTheirMeaning) {
  const json old = {{"zero_point", true},
                    {"q_group_size", -1},
                    {"w_bit", 4},
                    {"version", "GEMM"},
                    {"modules_to_not_convert", {"a", "b"}}};
  const QuantizationConfig parsed = Parse(nullptr, old);
  EXPECT_EQ(parsed.layout, Layout::kGemm);
  EXPECT_EQ(parsed.group_size, -1);
  EXPECT_EQ(parsed.modules_to_not_convert, (std::vector<std::string>{"a", "b"}));
  // config.json stands above the side file.
  EXPECT_EQ(Parse({{"quant_method", "awq"}, {"version", "gemv"}}, old).layout, Layout::kGemv);
  EXPECT_FALSE(Parse({{"quant_method", "awq"}, {"sym", true}}).zero_point);
  EXPECT_EQ(Parse({{"quant_method", "awq"}}).group_size, 128);
}

json Scheme() {
  return {{"quant_method", "compressed-tensors"},
          {"format", "pack-quantized"},
          {"ignore", {"lm_head"}},
          {"config_groups",
           {{"group_0",
             {{"targets", {"Linear"}},
              {"input_activations", nullptr},
              {"weights",
               {{"num_bits", 4},
                {"type", "int"},
                {"strategy", "group"},
                {"group_size", 64},
                {"symmetric", false},
                {"actorder", nullptr},
                {"dynamic", false}}}}}}}};
}

TEST(QuantizationConfigTest, CompressedTensorsSchemes) {
  json config = Scheme();
  QuantizationConfig parsed = Parse(config);
  EXPECT_EQ(parsed.layout, Layout::kCompressedTensors);
  EXPECT_EQ(parsed.group_size, 64);
  EXPECT_TRUE(parsed.zero_point);
  EXPECT_EQ(parsed.modules_to_not_convert, std::vector<std::string>{"lm_head"});

  json& weights = config["config_groups"]["group_0"]["weights"];
  weights["symmetric"] = true;
  EXPECT_FALSE(Parse(config).zero_point);
  weights["strategy"] = "channel";
  weights["group_size"] = nullptr;
  weights["actorder"] = "static";
  EXPECT_EQ(Parse(config).group_size, -1);

  config["config_groups"]["group_1"] = Scheme()["config_groups"]["group_0"];
  config["format"] = "mixed-precision";
  EXPECT_EQ(Parse(config).group_size, 0);  // differs by layer: the tensors tell
  EXPECT_TRUE(Parse(config).zero_point);
}

TEST(QuantizationConfigTest, RefusalsNameKeyValueAndWhatIsAllowed) {
  const auto changed = [](const char* pointer, const json& value) {
    json config = Scheme();
    config[json::json_pointer(pointer)] = value;
    return config;
  };
  const std::string weights = "/config_groups/group_0/weights/";
  const struct {
    json config;
    const char* code;
    const char* said;
    const char* allowed;
  } cases[] = {
      {{{"quant_method", "gptq"}}, "UNIMPLEMENTED", "\"gptq\"", "awq, compressed-tensors"},
      {{{"quant_method", "fp8"}}, "UNIMPLEMENTED", "\"fp8\"", "awq, compressed-tensors"},
      {{{"quant_method", 3}}, "INVALID", "quant_method is 3", "a string"},
      {{{"quant_method", "awq"}, {"bits", 8}}, "UNIMPLEMENTED", "bits is 8", "4"},
      {{{"quant_method", "awq"}, {"w_bit", 3}}, "UNIMPLEMENTED", "w_bit is 3", "4"},
      {{{"quant_method", "awq"}, {"version", "bitblas"}}, "UNIMPLEMENTED", "bitblas", "marlin"},
      {{{"quant_method", "awq"}, {"group_size", 0}}, "INVALID", "group_size is 0", "-1"},
      {{{"quant_method", "awq"}, {"group_size", "64"}}, "INVALID", "\"64\"", "an integer"},
      {{{"quant_method", "awq"}, {"modules_to_not_convert", "x"}}, "INVALID", "\"x\"", "array"},
      {{{"quant_method", "awq"}, {"modules_to_not_convert", {1}}}, "INVALID", "is 1", "array"},
      {json("text"), "INVALID", "\"text\"", "an object"},
      {changed((weights + "num_bits").c_str(), 8), "UNIMPLEMENTED", "num_bits is 8", "4"},
      {changed((weights + "type").c_str(), "float"), "UNIMPLEMENTED", "\"float\"", "int"},
      {changed((weights + "actorder").c_str(), "group"), "UNIMPLEMENTED", "actorder", "act-order"},
      {changed((weights + "actorder").c_str(), true), "UNIMPLEMENTED", "actorder", "act-order"},
      {changed((weights + "strategy").c_str(), "block"), "UNIMPLEMENTED", "\"block\"", "channel"},
      {changed((weights + "group_size").c_str(), nullptr), "INVALID", "group_size", "1 …"},
      {changed("/config_groups/group_0/input_activations", {{"num_bits", 8}}), "UNIMPLEMENTED",
       "input_activations", "null"},
      {changed("/format", "nvfp4-pack-quantized"), "UNIMPLEMENTED", "nvfp4", "pack-quantized"},
      {changed("/transform_config", {{"rotate", 1}}), "UNIMPLEMENTED", "transform_config", "null"},
      {changed("/sparsity_config", {{"format", "sparse-24"}}), "UNIMPLEMENTED", "sparsity_config",
       "null"},
      {changed("/sparsity_config", {{"format", 3}}), "UNIMPLEMENTED", "sparsity_config", "null"},
      {changed("/config_groups", json::object()), "INVALID", "config_groups", "at least one"},
      {changed("/config_groups/group_0", 3), "INVALID", "is 3", "an object"},
  };
  for (const auto& bad : cases) {
    EXPECT_THAT(Refusal(bad.config),
                AllOf(HasSubstr(bad.code), HasSubstr("config.json: quantization_config"),
                      HasSubstr(bad.said), HasSubstr(bad.allowed)));
  }
}

TEST(QuantizationConfigTest, AnUnnamedGptqSideFileIsRecognized) {
  EXPECT_THAT(Refusal(nullptr, {{"bits", 4},
                                {"group_size", 128},
                                {"damp_percent", 0.01},
                                {"desc_act", false},
                                {"sym", true}}),
              AllOf(HasSubstr("UNIMPLEMENTED"), HasSubstr("gptq")));
}

}  // namespace
}  // namespace nibble::weights
