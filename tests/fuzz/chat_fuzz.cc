// Any text as a chat template and as messages: bounded, and no message makes a control token.
//
// Input: texts separated by NUL. The first is a template, the others are contents of messages.
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "services/text/tokenizer.h"

namespace {

using nibble::text::ChatMessage;
using nibble::text::Tokenizer;

constexpr char kPlainChat[] =
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}"
    "{% endfor %}";

std::string TokenizerJson() {
  const char* source = std::getenv("NIBBLE_SOURCE_DIR");
  std::ifstream file(
      std::string(source == nullptr ? "." : source) + "/tests/data/text/byte-level-tokenizer.json",
      std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

absl::StatusOr<std::shared_ptr<const Tokenizer>> WithTemplate(std::string source) {
  static const std::string json = TokenizerJson();
  return Tokenizer::Create({.tokenizer_json = json, .chat_template = std::move(source)});
}

int64_t CountOf(const std::vector<int32_t>& ids, int32_t id) {
  int64_t count = 0;
  for (const int32_t other : ids) count += other == id;
  return count;
}

// As many turns begin and end as there are messages, whatever they say.
void CheckPlainChat(const std::vector<ChatMessage>& messages) {
  static const auto tokenizer = WithTemplate(kPlainChat).value();
  const auto ids = tokenizer->EncodeChat(messages, {});
  if (!ids.ok()) {
    CHECK(ids.status().code() == absl::StatusCode::kInvalidArgument);
    return;
  }
  const auto count = static_cast<int64_t>(messages.size());
  CHECK(CountOf(*ids, tokenizer->TokenId("<|im_start|>").value()) == count);
  CHECK(CountOf(*ids, tokenizer->TokenId("<|im_end|>").value()) == count);
  for (const char* other : {"<pad>", "<|fim|>"}) {
    CHECK(CountOf(*ids, tokenizer->TokenId(other).value()) == 0);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t end_of_template = std::min(input.find('\0'), size);
  std::vector<ChatMessage> messages;
  for (size_t at = end_of_template; at < size;) {
    const size_t end = std::min(input.find('\0', at + 1), size);
    messages.push_back(
        {.role = "user", .content = std::string(input.substr(at + 1, end - at - 1))});
    at = end;
  }
  CheckPlainChat(messages);
  const auto tokenizer = WithTemplate(std::string(input.substr(0, end_of_template)));
  if (!tokenizer.ok() || !(*tokenizer)->has_chat_template()) return 0;
  const auto text = (*tokenizer)->RenderChat(messages, {});
  CHECK(!text.ok() || text->size() <= size_t{1} << 20);
  const auto ids = (*tokenizer)->EncodeChat(messages, {});
  CHECK(text.ok() || !ids.ok());
  return 0;
}
