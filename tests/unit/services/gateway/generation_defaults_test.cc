#include "services/gateway/generation_defaults.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace nibble::gateway {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

GenerationFiles Files(std::string_view config, std::string_view generation,
                      std::optional<int32_t> tokenizer_eos = std::nullopt) {
  return {.config_json = config,
          .generation_config_json = generation,
          .tokenizer_eos = tokenizer_eos,
          .vocab_size = 1000};
}

GenerationDefaults Read(const GenerationFiles& files,
                        SamplingSource source = SamplingSource::kModel) {
  const auto defaults = ReadGenerationDefaults(files, source);
  EXPECT_TRUE(defaults.ok()) << defaults.status();
  return *defaults;
}

TEST(GenerationDefaults, EosIsTheUnionOfAllThreePlaces) {
  EXPECT_THAT(Read(Files(R"({"eos_token_id": 7})", R"({"eos_token_id": [9, 7, 3]})", 5)).eos_ids,
              ElementsAre(3, 5, 7, 9));
  EXPECT_THAT(Read(Files(R"({"eos_token_id": [1, 2]})", "", 2)).eos_ids, ElementsAre(1, 2));
  EXPECT_THAT(Read(Files(R"({"eos_token_id": null})", "{}")).eos_ids, IsEmpty());
  EXPECT_THAT(Read(Files("", "", 4)).eos_ids, ElementsAre(4));
}

TEST(GenerationDefaults, EosPastTheVocabularyIsLeftOut) {
  EXPECT_THAT(Read(Files(R"({"eos_token_id": [999, 1000]})", "")).eos_ids, ElementsAre(999));
}

TEST(GenerationDefaults, EosThatIsNoIdNamesItsFile) {
  for (const char* bad :
       {R"({"eos_token_id": "x"})", R"({"eos_token_id": -1})", R"({"eos_token_id": 1.5})",
        R"({"eos_token_id": [1, "x"]})", R"({"eos_token_id": 99999999999})",
        R"({"eos_token_id": 18446744073709551615})", R"([1])", "{"}) {
    const auto in_config = ReadGenerationDefaults(Files(bad, ""), SamplingSource::kModel);
    EXPECT_EQ(in_config.status().code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(in_config.status().message()), HasSubstr("config.json"));
    const auto in_generation = ReadGenerationDefaults(Files("", bad), SamplingSource::kModel);
    EXPECT_THAT(std::string(in_generation.status().message()), HasSubstr("generation_config.json"));
  }
}

TEST(GenerationDefaults, TakesTheModelsSampling) {
  const SamplingDefaults sampling =
      Read(Files("", R"({"do_sample": false, "temperature": 0.6, "top_p": 0.9, "top_k": 40,
                         "min_p": 0.05, "typical_p": 0.5, "repetition_penalty": 1.1})"))
          .sampling;
  EXPECT_FLOAT_EQ(sampling.temperature, 0.6F);
  EXPECT_FLOAT_EQ(sampling.top_p, 0.9F);
  EXPECT_EQ(sampling.top_k, 40U);
  EXPECT_FLOAT_EQ(sampling.min_p, 0.05F);
  EXPECT_FLOAT_EQ(sampling.typical_p, 0.5F);
  EXPECT_FLOAT_EQ(sampling.repetition_penalty, 1.1F);
}

TEST(GenerationDefaults, IgnoresTheModelsSamplingWhereConfigured) {
  const SamplingDefaults sampling =
      Read(Files("", R"({"temperature": 0.6, "top_k": 40})"), SamplingSource::kNibble).sampling;
  EXPECT_FLOAT_EQ(sampling.temperature, 1);
  EXPECT_EQ(sampling.top_k, 0U);
}

TEST(GenerationDefaults, ValueOutOfRangeIsNotTakenAndSaid) {
  const GenerationDefaults defaults =
      Read(Files("", R"({"temperature": -1, "top_p": 0, "top_k": -2, "min_p": "x",
                         "repetition_penalty": null})"));
  EXPECT_FLOAT_EQ(defaults.sampling.temperature, 1);
  EXPECT_FLOAT_EQ(defaults.sampling.top_p, 1);
  EXPECT_EQ(defaults.sampling.top_k, 0U);
  EXPECT_EQ(defaults.warnings.size(), 4U);
}

TEST(GenerationDefaults, DoubleBosIsDroppedOnce) {
  std::vector<int32_t> ids = {1, 1, 1, 5};
  DropDoubleBos(1, &ids);
  EXPECT_THAT(ids, ElementsAre(1, 1, 5));
  ids = {1, 5, 1};
  DropDoubleBos(1, &ids);
  EXPECT_THAT(ids, ElementsAre(1, 5, 1));
  ids = {1};
  DropDoubleBos(1, &ids);
  EXPECT_THAT(ids, ElementsAre(1));
  ids = {2, 2};
  DropDoubleBos(std::nullopt, &ids);
  EXPECT_THAT(ids, ElementsAre(2, 2));
}

}  // namespace
}  // namespace nibble::gateway
