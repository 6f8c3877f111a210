#include "services/text/tokenizer.h"

#include <utility>

#include "base/check.h"
#include "base/status.h"
#include "services/text/text.h"

namespace nibble::text {
namespace {

nibble_text_view ViewOf(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

std::string_view TextOf(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

// Takes the message over.
absl::Status StatusOf(nibble_text_status status) {
  if (status.code == 0) return absl::OkStatus();
  const std::string_view message = TextOf(status.message.data, status.message.size);
  absl::Status result(static_cast<absl::StatusCode>(status.code),
                      absl::string_view(message.data(), message.size()));
  nibble_text_bytes_free(status.message);
  return result;
}

// Takes the bytes over.
std::string StringOf(nibble_text_bytes bytes) {
  std::string text(TextOf(bytes.data, bytes.size));
  nibble_text_bytes_free(bytes);
  return text;
}

// Takes the ids over.
std::vector<int32_t> VectorOf(nibble_text_ids ids) {
  std::vector<int32_t> result;
  if (ids.size > 0) result.assign(ids.data, ids.data + ids.size);
  nibble_text_ids_free(ids);
  return result;
}

struct FreeStream {
  void operator()(nibble_text_stream* stream) const { nibble_text_stream_free(stream); }
};

struct FreeTokenizer {
  void operator()(const nibble_text_tokenizer* tokenizer) const {
    nibble_text_tokenizer_free(tokenizer);
  }
};

class RustTokenStream final : public TokenStream {
 public:
  explicit RustTokenStream(nibble_text_stream* stream) : stream_(stream) {}

  absl::StatusOr<std::string> Push(int32_t token_id) override {
    nibble_text_view piece{};
    RETURN_IF_ERROR(StatusOf(nibble_text_stream_push(stream_.get(), token_id, &piece)));
    return std::string(TextOf(piece.data, piece.size));
  }

  absl::StatusOr<std::string> Finish() override {
    nibble_text_view piece{};
    RETURN_IF_ERROR(StatusOf(nibble_text_stream_finish(stream_.get(), &piece)));
    return std::string(TextOf(piece.data, piece.size));
  }

 private:
  std::unique_ptr<nibble_text_stream, FreeStream> stream_;
};

// The messages of a chat as the C interface takes them. Borrows from what it is made of.
class Conversation {
 public:
  Conversation(std::span<const ChatMessage> messages, const ChatOptions& options) {
    messages_.reserve(messages.size());
    for (const ChatMessage& message : messages) {
      messages_.push_back({.role = ViewOf(message.role),
                           .content = ViewOf(message.content),
                           .name = ViewOf(message.name),
                           .tool_calls_json = ViewOf(message.tool_calls_json),
                           .tool_call_id = ViewOf(message.tool_call_id)});
    }
    chat_ = {.messages = messages_.data(),
             .message_count = messages_.size(),
             .tools_json = ViewOf(options.tools_json),
             .date = ViewOf(options.date_string),
             .add_generation_prompt = options.add_generation_prompt};
  }
  Conversation(const Conversation&) = delete;
  Conversation& operator=(const Conversation&) = delete;

  [[nodiscard]] const nibble_text_chat* get() const { return &chat_; }

 private:
  std::vector<nibble_text_message> messages_;
  nibble_text_chat chat_{};
};

class RustTokenizer final : public Tokenizer {
 public:
  explicit RustTokenizer(const nibble_text_tokenizer* tokenizer)
      : tokenizer_(tokenizer), facts_(nibble_text_tokenizer_facts(tokenizer)) {}

  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool add_special,
                                              bool parse_special) const override {
    nibble_text_ids ids{};
    RETURN_IF_ERROR(StatusOf(
        nibble_text_encode(tokenizer_.get(), ViewOf(text), add_special, parse_special, &ids)));
    return VectorOf(ids);
  }

  absl::StatusOr<std::string> Decode(std::span<const int32_t> ids,
                                     bool skip_special) const override {
    nibble_text_bytes text{};
    RETURN_IF_ERROR(StatusOf(
        nibble_text_decode(tokenizer_.get(), ids.data(), ids.size(), skip_special, &text)));
    return StringOf(text);
  }

  std::unique_ptr<TokenStream> NewStream(bool skip_special) const override {
    return std::make_unique<RustTokenStream>(
        nibble_text_stream_create(tokenizer_.get(), skip_special));
  }

  absl::StatusOr<std::string> RenderChat(std::span<const ChatMessage> messages,
                                         const ChatOptions& options) const override {
    const Conversation conversation(messages, options);
    nibble_text_bytes text{};
    RETURN_IF_ERROR(StatusOf(nibble_text_render_chat(tokenizer_.get(), conversation.get(), &text)));
    return StringOf(text);
  }

  absl::StatusOr<std::vector<int32_t>> EncodeChat(std::span<const ChatMessage> messages,
                                                  const ChatOptions& options) const override {
    const Conversation conversation(messages, options);
    nibble_text_ids ids{};
    RETURN_IF_ERROR(StatusOf(nibble_text_encode_chat(tokenizer_.get(), conversation.get(), &ids)));
    return VectorOf(ids);
  }

  int32_t vocab_size() const override { return facts_.vocab_size; }
  std::optional<int32_t> TokenId(std::string_view token) const override {
    return Present(nibble_text_token_id(tokenizer_.get(), ViewOf(token)));
  }
  absl::StatusOr<std::string> TokenBytes(int32_t id) const override {
    nibble_text_bytes bytes{};
    RETURN_IF_ERROR(StatusOf(nibble_text_token_bytes(tokenizer_.get(), id, &bytes)));
    return StringOf(bytes);
  }
  std::optional<int32_t> bos_id() const override { return Present(facts_.bos_id); }
  std::optional<int32_t> eos_id() const override { return Present(facts_.eos_id); }
  bool has_chat_template() const override { return facts_.has_chat_template; }

 private:
  static std::optional<int32_t> Present(int32_t id) {
    return id >= 0 ? std::optional<int32_t>(id) : std::nullopt;
  }

  std::unique_ptr<const nibble_text_tokenizer, FreeTokenizer> tokenizer_;
  nibble_text_facts facts_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::Create(const TokenizerFiles& files) {
  const nibble_text_tokenizer* tokenizer = nullptr;
  RETURN_IF_ERROR(StatusOf(nibble_text_tokenizer_create(ViewOf(files.tokenizer_json),
                                                        ViewOf(files.tokenizer_config_json),
                                                        ViewOf(files.chat_template), &tokenizer)));
  CHECK(tokenizer != nullptr);
  return std::make_shared<const RustTokenizer>(tokenizer);
}

std::unique_ptr<TokenStream> Tokenizer::NewStreamAfter(std::span<const int32_t> before,
                                                       bool skip_special) const {
  std::unique_ptr<TokenStream> stream = NewStream(skip_special);
  for (const int32_t id : before) {
    // Only its effect on the state is wanted; an error would come again with the next token.
    (void)stream->Push(id);
  }
  return stream;
}

}  // namespace nibble::text
