// Encoding and whole decoding, against what other programs computed.
#include "services/text/tokenizer.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/unit/services/text/text_files.h"

namespace nibble::text {
namespace {

using testing::LoadTokenizer;
using testing::ReadJson;
using testing::ReadText;
using ::nibble::testing::TestData;

constexpr char kSmolLm2[] = "models/smollm2-135m-awq-gemm-g64";

TEST(TokenizerTest, EncodesTheGoldenPrompts) {
  const auto folder = TestData(kSmolLm2, "TokenizerTest.EncodesTheGoldenPrompts");
  if (!folder) return;
  const auto tokenizer = LoadTokenizer(*folder);
  ASSERT_NE(tokenizer, nullptr);
  for (const auto& prompt : ReadJson(*folder + "/goldens.json")["prompts"]) {
    SCOPED_TRACE(prompt["name"].get<std::string>());
    const auto expected = prompt["prompt_token_ids"].get<std::vector<int32_t>>();
    const bool chat = prompt["kind"] != "raw";
    const std::string text = prompt[chat ? "rendered_prompt" : "prompt"];
    const auto ids = tokenizer->Encode(text, /*add_special=*/true, /*parse_special=*/chat);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, expected);
    if (chat) {
      std::vector<ChatMessage> messages;
      for (const auto& message : prompt["messages"]) {
        messages.push_back({.role = message["role"], .content = message["content"]});
      }
      const auto rendered = tokenizer->RenderChat(messages, {});
      ASSERT_TRUE(rendered.ok()) << rendered.status();
      EXPECT_EQ(*rendered, text);
      const auto chat_ids = tokenizer->EncodeChat(messages, {});
      ASSERT_TRUE(chat_ids.ok()) << chat_ids.status();
      EXPECT_EQ(*chat_ids, expected);
    }
    const auto generated = prompt["generated_token_ids"].get<std::vector<int32_t>>();
    const auto decoded = tokenizer->Decode(generated, /*skip_special=*/false);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    EXPECT_EQ(*decoded, prompt["generated_text"].get<std::string>());
  }
}

}  // namespace
}  // namespace nibble::text
