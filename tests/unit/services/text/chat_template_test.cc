// Chat templates: what they render to, against transformers, and what bounds them.
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/unit/services/text/chat_files.h"

namespace nibble::text {
namespace {

using ::nibble::testing::TestData;
using ::testing::AllOf;
using testing::Chat;
using testing::DataPath;
using ::testing::HasSubstr;
using testing::LoadTokenizer;
using testing::MakeTokenizer;
using testing::ReadChat;
using testing::ReadJson;
using testing::ReadText;
using testing::WithTemplate;

constexpr char kSmolLm2[] = "models/smollm2-135m-awq-gemm-g64";

// The template's source; empty where it belongs to a folder that is absent.
std::string TemplateSource(const nlohmann::ordered_json& renderings, const std::string& name) {
  if (!name.starts_with("@")) return renderings["templates"][name];
  const auto folder = TestData(name == "@qwen3" ? "tokenizers/qwen3" : kSmolLm2,
                               "ChatTemplateTest.RendersAsTransformersDoes in part");
  if (!folder) return "";
  return ReadJson(*folder + "/tokenizer_config.json")["chat_template"];
}

TEST(ChatTemplateTest, RendersAsTransformersDoes) {
  const auto data = ReadJson(DataPath("chat-renderings.json"));
  for (const auto& rendering : data["renderings"]) {
    const std::string conversation = rendering["conversation"];
    SCOPED_TRACE(rendering["template"].get<std::string>() + ", " + conversation);
    const std::string source = TemplateSource(data, rendering["template"]);
    if (source.empty()) continue;
    const auto tokenizer =
        MakeTokenizer({.tokenizer_json = ReadText(DataPath("byte-level-tokenizer.json")),
                       .tokenizer_config_json = R"({"bos_token": "<s>", "eos_token": "</s>"})",
                       .chat_template = source});
    ASSERT_NE(tokenizer, nullptr);
    Chat chat = ReadChat(data["conversations"][conversation]);
    chat.options.date_string = "2025-01-31T12:34:56";
    const auto text = tokenizer->RenderChat(chat.messages, chat.options);
    if (rendering.contains("error")) {
      EXPECT_EQ(text.status().code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(text.status().message()),
                  HasSubstr(rendering["error"].get<std::string>()));
    } else {
      ASSERT_TRUE(text.ok()) << text.status();
      EXPECT_EQ(*text, rendering["text"].get<std::string>());
    }
  }
}

TEST(ChatTemplateTest, RendersAndEncodesTheGoldenChats) {
  const auto folder = TestData(kSmolLm2, "ChatTemplateTest.RendersAndEncodesTheGoldenChats");
  if (!folder) return;
  const auto tokenizer = LoadTokenizer(*folder);
  ASSERT_NE(tokenizer, nullptr);
  const auto goldens = ReadJson(*folder + "/goldens.json");
  for (const auto& prompt : goldens["prompts"]) {
    if (prompt["kind"] == "raw") continue;
    SCOPED_TRACE(prompt["name"].get<std::string>());
    const Chat chat = ReadChat(prompt);
    EXPECT_EQ(tokenizer->RenderChat(chat.messages, chat.options).value(),
              prompt["rendered_prompt"].get<std::string>());
    const auto ids = tokenizer->EncodeChat(chat.messages, chat.options).value();
    const auto golden = prompt["prompt_token_ids"].get<std::vector<int32_t>>();
    // One prompt quotes <|endoftext|>. The reference makes it a control token; here what stands in
    // a message stays text.
    const int32_t end_of_text = tokenizer->TokenId("<|endoftext|>").value();
    if (std::count(golden.begin(), golden.end(), end_of_text) == 0) {
      EXPECT_EQ(ids, golden);
    } else {
      EXPECT_EQ(std::count(ids.begin(), ids.end(), end_of_text), 0);
      EXPECT_EQ(tokenizer->Decode(ids, false).value(),
                prompt["rendered_prompt"].get<std::string>());
    }
  }
}

TEST(ChatTemplateTest, TakesTheTemplateForToolsWhereToolsAreGiven) {
  const auto tokenizer =
      MakeTokenizer({.tokenizer_json = ReadText(DataPath("byte-level-tokenizer.json")),
                     .tokenizer_config_json =
                         R"({"chat_template": [{"name": "default", "template": "plain"},
                                 {"name": "tool_use", "template": "with {{ tools|length }}"}]})"});
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->RenderChat({}, {}).value(), "plain");
  EXPECT_EQ(tokenizer->RenderChat({}, {.tools_json = "[{}, {}]"}).value(), "with 2");
}

TEST(ChatTemplateTest, PrefersTheTemplateInItsOwnFile) {
  const auto tokenizer =
      MakeTokenizer({.tokenizer_json = ReadText(DataPath("byte-level-tokenizer.json")),
                     .tokenizer_config_json = R"({"chat_template": "old"})",
                     .chat_template = "new"});
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->RenderChat({}, {}).value(), "new");
}

TEST(ChatTemplateTest, RefusesATagThatOpensAndClosesAtOnce) {
  const auto tokenizer = text::Tokenizer::Create(
      {.tokenizer_json = ReadText(DataPath("byte-level-tokenizer.json")), .chat_template = "{%}"});
  EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument) << tokenizer.status();
}

TEST(ChatTemplateTest, FailsWhereTheModelHasNoTemplate) {
  const auto tokenizer = WithTemplate("");
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_FALSE(tokenizer->has_chat_template());
  EXPECT_EQ(tokenizer->RenderChat({}, {}).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(tokenizer->EncodeChat({}, {}).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(ChatTemplateTest, GivesTheDateOnlyWhereTheCallerDoes) {
  const auto tokenizer = WithTemplate(
      "{{ strftime_now('%A %-d %B %Y, %I:%M %p') if strftime_now is defined else 'no clock' }}"
      "|{{ date_string }}");
  ASSERT_NE(tokenizer, nullptr);
  EXPECT_EQ(tokenizer->RenderChat({}, {}).value(), "no clock|");
  EXPECT_EQ(tokenizer->RenderChat({}, {.date_string = "2024-02-09T00:05:00"}).value(),
            "Friday 9 February 2024, 12:05 AM|");
  EXPECT_EQ(tokenizer->RenderChat({}, {.date_string = "2000-01-01"}).value(),
            "Saturday 1 January 2000, 12:00 AM|");
  EXPECT_EQ(tokenizer->RenderChat({}, {.date_string = "26 Jul 2024"}).value(),
            "26 Jul 2024|26 Jul 2024");
}

TEST(ChatTemplateTest, GivesArgumentsAsAnObject) {
  const auto tokenizer =
      WithTemplate("{{ messages[0].tool_calls[0].function.arguments | tojson }}");
  ASSERT_NE(tokenizer, nullptr);
  const auto rendered = [&](const std::string& arguments) {
    const ChatMessage message = {
        .role = "assistant",
        .content = "",
        .tool_calls_json = R"([{"function": {"name": "f", "arguments": )" + arguments + "}}]"};
    return tokenizer->RenderChat({{message}}, {}).value();
  };
  EXPECT_EQ(rendered(R"({"b":1,"a":[true]})"), R"({"b": 1, "a": [true]})");
  EXPECT_EQ(rendered(R"("{\"b\":1,\"a\":[true]}")"), R"({"b": 1, "a": [true]})");
  EXPECT_EQ(rendered(R"("not json")"), R"("not json")");
}

TEST(ChatTemplateTest, NamesTheFieldThatIsWrong) {
  const auto tokenizer = WithTemplate("{{ messages }}");
  ASSERT_NE(tokenizer, nullptr);
  const auto message_of = [&](const ChatMessage& message, const ChatOptions& options) {
    const std::vector<ChatMessage> messages = {{.role = "user", .content = ""}, message};
    const auto text = tokenizer->RenderChat(messages, options);
    EXPECT_EQ(text.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(text.status().message());
  };
  EXPECT_THAT(message_of({.role = "root", .content = ""}, {}),
              AllOf(HasSubstr("messages[1].role"), HasSubstr("assistant")));
  EXPECT_THAT(message_of({.role = "user", .content = "\xff"}, {}),
              HasSubstr("messages[1].content"));
  EXPECT_THAT(message_of({.role = "user", .content = "", .tool_calls_json = "{}"}, {}),
              HasSubstr("messages[1].tool_calls is not a JSON array"));
  EXPECT_THAT(message_of({.role = "user", .content = ""}, {.tools_json = "[1,"}),
              HasSubstr("tools is not valid JSON"));
  const std::string deep(100'000, '[');
  EXPECT_THAT(message_of({.role = "user", .content = ""}, {.tools_json = deep}),
              HasSubstr("tools is not valid JSON"));
}

TEST(ChatTemplateTest, BoundsWorkOutputAndDepth) {
  const struct {
    const char* source;
    const char* part;
  } cases[] = {
      {"{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}", "steps"},
      {"{% for a in range(3000) %}{{ 'x' * 1000 }}{% endfor %}", "1048576 bytes"},
      {"{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}", "fails"},
      {"{{ messages.nothing.at.all }}", "fails at line 1"},
      {"{{ ''.count('') }}", "empty separator"},
      {"{% include 'default' %}", "fails"},
      {"{{ raise_exception('no ' ~ 3) }}", "refuses: no 3"},
      {"{{ unknown_function() }}", "unknown_function"},
  };
  for (const auto& test : cases) {
    SCOPED_TRACE(test.source);
    const auto tokenizer = WithTemplate(test.source);
    ASSERT_NE(tokenizer, nullptr);
    const auto text = tokenizer->RenderChat({}, {});
    EXPECT_EQ(text.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(text.status().message()), HasSubstr(test.part));
  }
}

}  // namespace
}  // namespace nibble::text
