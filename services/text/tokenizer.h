// Text to token ids and back, and chat templates: a C++ face on the Rust library behind text.h.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace nibble::text {

struct TokenizerFiles {
  std::string tokenizer_json;
  std::string tokenizer_config_json = {};  // may be empty
  std::string chat_template = {};          // chat_template.jinja; empty = the config's own
};

struct ChatMessage {
  // system, developer, user, assistant, tool, function or ipython.
  std::string role;
  std::string content;
  std::string name = {};  // empty = none
  // JSON array; empty = none. A call's arguments may be an object or its JSON in a string.
  std::string tool_calls_json = {};
  std::string tool_call_id = {};  // empty = none
};

struct ChatOptions {
  bool add_generation_prompt = true;
  std::string tools_json = {};  // JSON array of tool definitions; empty = none
  // For templates that ask for the date. "2025-01-31" or "2025-01-31T12:34:56" is what their
  // strftime_now formats; other text is what it returns, and their variable date_string. Empty =
  // the template gets neither.
  std::string date_string = {};
};

// Turns token ids into text as they arrive. Emits whole UTF-8 characters only; the pieces
// concatenate to Decode() of all ids. One thread.
class TokenStream {
 public:
  virtual ~TokenStream() = default;
  [[nodiscard]] virtual absl::StatusOr<std::string> Push(int32_t token_id) = 0;
  // What is still held back (an incomplete character becomes U+FFFD).
  [[nodiscard]] virtual absl::StatusOr<std::string> Finish() = 0;
};

// Immutable and thread-safe.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // INVALID_ARGUMENT says which file does not parse.
  [[nodiscard]] static absl::StatusOr<std::shared_ptr<const Tokenizer>> Create(
      const TokenizerFiles& files);

  // Encodes text. Special tokens that the tokenizer's post-processor adds (BOS) are added where
  // add_special is set; special strings inside `text` are ordinary text unless parse_special.
  [[nodiscard]] virtual absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                                                    bool add_special,
                                                                    bool parse_special) const = 0;
  // An id that the vocabulary does not have adds nothing.
  [[nodiscard]] virtual absl::StatusOr<std::string> Decode(std::span<const int32_t> ids,
                                                           bool skip_special) const = 0;
  [[nodiscard]] virtual std::unique_ptr<TokenStream> NewStream(bool skip_special) const = 0;
  // A stream whose text continues that of `before`, such as a raw prompt: sentencepiece-like
  // tokenizers drop the space before the first word of a text, which here is not the first.
  [[nodiscard]] std::unique_ptr<TokenStream> NewStreamAfter(std::span<const int32_t> before,
                                                            bool skip_special) const;

  // Renders the model's chat template. Bounded time and output; FAILED_PRECONDITION where the
  // model has no template, INVALID_ARGUMENT with the template's own message where it refuses.
  [[nodiscard]] virtual absl::StatusOr<std::string> RenderChat(
      std::span<const ChatMessage> messages, const ChatOptions& options) const = 0;
  // Renders and encodes; what stands inside a message's content never becomes a control token.
  [[nodiscard]] virtual absl::StatusOr<std::vector<int32_t>> EncodeChat(
      std::span<const ChatMessage> messages, const ChatOptions& options) const = 0;

  [[nodiscard]] virtual int32_t vocab_size() const = 0;
  [[nodiscard]] virtual std::optional<int32_t> TokenId(std::string_view token) const = 0;
  // The bytes that a token adds in the middle of a text, which may be a part of a character; empty
  // for an id that the vocabulary does not have.
  [[nodiscard]] virtual absl::StatusOr<std::string> TokenBytes(int32_t id) const = 0;
  [[nodiscard]] virtual std::optional<int32_t> bos_id() const = 0;  // from tokenizer_config.json
  [[nodiscard]] virtual std::optional<int32_t> eos_id() const = 0;
  [[nodiscard]] virtual bool has_chat_template() const = 0;
};

}  // namespace nibble::text
