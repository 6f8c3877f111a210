// Encoding and whole decoding, against what other programs computed.
#include "services/text/tokenizer.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/unit/services/text/text_files.h"

namespace nibble::text {
namespace {

using ::nibble::testing::TestData;
using ::testing::Contains;
using testing::DataPath;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::LoadTokenizer;
using testing::MakeTokenizer;
using testing::NamedTokenizer;
using ::testing::Not;
using testing::ReadJson;
using testing::ReadText;

constexpr char kSmolLm2[] = "models/smollm2-135m-awq-gemm-g64";

using Ids = std::vector<int32_t>;

std::shared_ptr<const Tokenizer> ByteLevel(const std::string& config = "") {
  return MakeTokenizer({.tokenizer_json = ReadText(DataPath("byte-level-tokenizer.json")),
                        .tokenizer_config_json = config});
}

std::shared_ptr<const Tokenizer> Stories(const std::string& config = "") {
  return MakeTokenizer({.tokenizer_json = ReadText(DataPath("stories260k-tokenizer.json")),
                        .tokenizer_config_json = config});
}

TEST(TokenizerTest, EncodesAsTheTokenizersLibraryDoes) {
  const auto vectors = ReadJson(DataPath("token-vectors.json"));
  for (const auto& [name, cases] : vectors["tokenizers"].items()) {
    SCOPED_TRACE(name);
    const auto tokenizer =
        NamedTokenizer(name, "TokenizerTest.EncodesAsTheTokenizersLibraryDoes in part");
    if (tokenizer == nullptr) continue;
    for (const auto& row : cases["encode"]) {
      const std::string text = row[0];
      SCOPED_TRACE(text);
      const auto with_specials = tokenizer->Encode(text, true, true);
      ASSERT_TRUE(with_specials.ok()) << with_specials.status();
      EXPECT_EQ(*with_specials, row[1].get<Ids>());
      const auto ordinary = tokenizer->Encode(text, false, false);
      ASSERT_TRUE(ordinary.ok()) << ordinary.status();
      EXPECT_EQ(*ordinary, row[2].get<Ids>());
    }
  }
}

TEST(TokenizerTest, DecodesAsTheTokenizersLibraryDoes) {
  const auto vectors = ReadJson(DataPath("token-vectors.json"));
  for (const auto& [name, cases] : vectors["tokenizers"].items()) {
    SCOPED_TRACE(name);
    const auto tokenizer =
        NamedTokenizer(name, "TokenizerTest.DecodesAsTheTokenizersLibraryDoes in part");
    if (tokenizer == nullptr) continue;
    for (const auto& row : cases["decode"]) {
      SCOPED_TRACE(row[0].dump());
      const Ids ids = row[0];
      EXPECT_EQ(tokenizer->Decode(ids, false).value(), row[1].get<std::string>());
      EXPECT_EQ(tokenizer->Decode(ids, true).value(), row[2].get<std::string>());
    }
  }
}

TEST(TokenizerTest, EncodesTheGoldenPrompts) {
  const auto folder = TestData(kSmolLm2, "TokenizerTest.EncodesTheGoldenPrompts");
  if (!folder) return;
  const auto tokenizer = LoadTokenizer(*folder);
  ASSERT_NE(tokenizer, nullptr);
  const auto goldens = ReadJson(*folder + "/goldens.json");
  for (const auto& prompt : goldens["prompts"]) {
    SCOPED_TRACE(prompt["name"].get<std::string>());
    const bool chat = prompt["kind"] != "raw";
    const std::string text = prompt[chat ? "rendered_prompt" : "prompt"];
    const auto ids = tokenizer->Encode(text, /*add_special=*/true, /*parse_special=*/chat);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, prompt["prompt_token_ids"].get<Ids>());
    const auto decoded = tokenizer->Decode(prompt["generated_token_ids"].get<Ids>(), false);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(*decoded, prompt["generated_text"].get<std::string>());
  }
}

TEST(TokenizerTest, EncodesTheTextOfThePerplexityGolden) {
  const char* tests = "TokenizerTest.EncodesTheTextOfThePerplexityGolden";
  const auto folder = TestData(kSmolLm2, tests);
  const auto path = TestData("text/wikitext2-test.txt", tests);
  if (!folder || !path) return;
  const auto tokenizer = LoadTokenizer(*folder);
  ASSERT_NE(tokenizer, nullptr);
  const auto golden = ReadJson(*folder + "/perplexity.json")["token_ids"].get<Ids>();
  const std::string text = ReadText(*path);
  const auto ids = tokenizer->Encode(text, false, false);
  ASSERT_TRUE(ids.ok()) << ids.status();
  ASSERT_GE(ids->size(), golden.size());
  EXPECT_TRUE(std::equal(golden.begin(), golden.end(), ids->begin()));
  EXPECT_TRUE(tokenizer->Decode(*ids, false).value() == text);
}

TEST(TokenizerTest, ReadsSpecialStringsOnlyWhereAsked) {
  const auto tokenizer = ByteLevel();
  ASSERT_NE(tokenizer, nullptr);
  const int32_t end = tokenizer->TokenId("<|im_end|>").value();
  EXPECT_THAT(tokenizer->Encode("<|im_end|>", false, true).value(), ElementsAre(end));
  const Ids ordinary = tokenizer->Encode("<|im_end|>", false, false).value();
  EXPECT_GT(ordinary.size(), 1u);
  EXPECT_THAT(ordinary, Not(Contains(end)));
  EXPECT_EQ(tokenizer->Decode(ordinary, true).value(), "<|im_end|>");
}

TEST(TokenizerTest, TakesFactsFromBothFiles) {
  const auto tokenizer = ByteLevel(
      R"({"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>",
          "pad_token": null})");
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->bos_id(), tokenizer->TokenId("<|im_start|>"));
  EXPECT_EQ(tokenizer->eos_id(), tokenizer->TokenId("<|im_end|>"));
  EXPECT_EQ(tokenizer->TokenId("no such token"), std::nullopt);
  EXPECT_EQ(tokenizer->vocab_size(), tokenizer->TokenId("word").value() + 1);
  EXPECT_FALSE(tokenizer->has_chat_template());
  EXPECT_EQ(ByteLevel()->bos_id(), std::nullopt);
}

TEST(TokenizerTest, AddsTheBeginningOnce) {
  const auto tokenizer = Stories(R"({"bos_token": "<s>", "eos_token": "</s>"})");
  ASSERT_NE(tokenizer, nullptr);
  const Ids once = tokenizer->Encode("Once", true, false).value();
  EXPECT_EQ(once.front(), 1);
  EXPECT_EQ(tokenizer->Encode("<s>Once", true, true).value(), once);
  EXPECT_NE(tokenizer->Encode("Once", false, false).value().front(), 1);
}

TEST(TokenizerTest, LetsTheConfigOfALlamaDecideWhatIsAdded) {
  const auto without = Stories(
      R"({"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer",
          "add_bos_token": false, "add_eos_token": true})");
  ASSERT_NE(without, nullptr);
  const Ids ids = without->Encode("Once", true, false).value();
  EXPECT_NE(ids.front(), 1);
  EXPECT_EQ(ids.back(), 2);
}

TEST(TokenizerTest, ShowsInvalidByteTokensOneByOne) {
  const auto tokenizer = Stories();
  ASSERT_NE(tokenizer, nullptr);
  // <0xE6> <0xB1> <0x89> is 汉; <0xE6> <0xB1> alone is nothing. Byte b is id b + 3.
  const Ids ids = {0xe6 + 3, 0xb1 + 3, 0x89 + 3, 0xe6 + 3, 0xb1 + 3, 'a' + 3};
  EXPECT_EQ(tokenizer->Decode(ids, false).value(), "汉\uFFFD\uFFFDa");
  // Other text ends an incomplete character.
  const Ids cut = {0xe6 + 3, 0xb1 + 3, tokenizer->TokenId("\u2581the").value(), 0x89 + 3};
  EXPECT_EQ(tokenizer->Decode(cut, false).value(), "\uFFFD\uFFFD the\uFFFD");
}

TEST(TokenizerTest, TellsTheBytesOfOneToken) {
  const auto stories = Stories();
  ASSERT_NE(stories, nullptr);
  EXPECT_EQ(stories->TokenBytes(0xe6 + 3).value(), "\xe6");
  EXPECT_EQ(stories->TokenBytes(stories->TokenId("\u2581the").value()).value(), " the");
  const auto byte_level = ByteLevel();
  ASSERT_NE(byte_level, nullptr);
  EXPECT_EQ(byte_level->TokenBytes(byte_level->TokenId("\u00e6").value()).value(), "\xe6");
  EXPECT_EQ(byte_level->TokenBytes(byte_level->TokenId("<|im_end|>").value()).value(),
            "<|im_end|>");
  EXPECT_EQ(byte_level->TokenBytes(-1).value(), "");
}

TEST(TokenizerTest, DecodesUnknownIdsToNothing) {
  const auto tokenizer = ByteLevel();
  ASSERT_NE(tokenizer, nullptr);
  const Ids ids = {-1, 100, tokenizer->vocab_size(), 2'000'000'000};
  EXPECT_EQ(tokenizer->Decode(ids, false).value(), tokenizer->Decode(Ids{100}, false).value());
}

TEST(TokenizerTest, RefusesTextThatIsNotUtf8) {
  const auto tokenizer = ByteLevel();
  ASSERT_NE(tokenizer, nullptr);
  const auto ids = tokenizer->Encode("good\xff", true, false);
  EXPECT_EQ(ids.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(ids.status().message()), HasSubstr("byte 4"));
}

TEST(TokenizerTest, SaysWhichFileDoesNotParse) {
  const std::string good = ReadText(DataPath("byte-level-tokenizer.json"));
  const struct {
    TokenizerFiles files;
    const char* part;
  } cases[] = {
      {{.tokenizer_json = ""}, "tokenizer.json"},
      {{.tokenizer_json = "{}"}, "tokenizer.json"},
      {{.tokenizer_json = good.substr(0, good.size() / 2)}, "tokenizer.json"},
      {{.tokenizer_json = good, .tokenizer_config_json = "[1"}, "tokenizer_config.json"},
      {{.tokenizer_json = good, .tokenizer_config_json = "[]"}, "tokenizer_config.json"},
      {{.tokenizer_json = good, .tokenizer_config_json = R"({"chat_template": 5})"},
       "tokenizer_config.json"},
      {{.tokenizer_json = good, .chat_template = "{% if %}"}, "chat template"},
  };
  for (const auto& test : cases) {
    const auto tokenizer = Tokenizer::Create(test.files);
    EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr(test.part));
  }
}

TEST(TokenizerTest, RefusesADecoderThatNeedsToLookAhead) {
  auto json = ReadJson(DataPath("byte-level-tokenizer.json"));
  json["decoder"] = {{"type", "WordPiece"}, {"prefix", "##"}, {"cleanup", true}};
  const auto tokenizer = Tokenizer::Create({.tokenizer_json = json.dump()});
  EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr("WordPiece"));
}

TEST(TokenizerTest, TakesASpecialTokenApartThatTheModelFindsByItself) {
  // With ignore_merges a whole word is looked up first, and the vocabulary holds this one.
  auto json = ReadJson(DataPath("byte-level-tokenizer.json"));
  json["model"]["ignore_merges"] = true;
  json["model"]["vocab"]["girl"] = 5000;
  json["added_tokens"].push_back({{"id", 5000},
                                  {"content", "girl"},
                                  {"single_word", false},
                                  {"lstrip", false},
                                  {"rstrip", false},
                                  {"normalized", false},
                                  {"special", true}});
  const auto tokenizer = MakeTokenizer({.tokenizer_json = json.dump()});
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_THAT(tokenizer->Encode("girl", false, true).value(), ElementsAre(5000));
  const Ids ordinary = tokenizer->Encode("girl", false, false).value();
  EXPECT_THAT(ordinary, Not(Contains(5000)));
  EXPECT_EQ(tokenizer->Decode(ordinary, false).value(), "girl");
}

}  // namespace
}  // namespace nibble::text
