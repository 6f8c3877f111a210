// Conversations of the test data, and tokenizers with a template of the test's own.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"
#include "services/text/tokenizer.h"
#include "tests/unit/services/text/text_files.h"

namespace nibble::text::testing {

struct Chat {
  std::vector<ChatMessage> messages;
  ChatOptions options;
};

// A conversation as chat-renderings.json writes it.
inline Chat ReadChat(const nlohmann::ordered_json& value) {
  Chat chat;
  for (const auto& message : value["messages"]) {
    ChatMessage& read = chat.messages.emplace_back();
    read.role = message["role"];
    read.content = message["content"];
    read.name = message.value("name", "");
    read.tool_call_id = message.value("tool_call_id", "");
    if (message.contains("tool_calls")) read.tool_calls_json = message["tool_calls"].dump();
  }
  if (value.contains("tools")) chat.options.tools_json = value["tools"].dump();
  chat.options.add_generation_prompt = value.value("gen", true);
  return chat;
}

// The byte-level tokenizer of the repository with a chat template.
inline std::shared_ptr<const Tokenizer> WithTemplate(const std::string& chat_template) {
  return MakeTokenizer(
      {.tokenizer_json = ReadText(DataPath("byte-level-tokenizer.json")),
       .tokenizer_config_json = R"({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})",
       .chat_template = chat_template});
}

}  // namespace nibble::text::testing
