// A tokenizer whose ids 0 … 255 are bytes, 256 "<s>" and 257 "</s>" special: what a test expects of
// a text can be read off the text itself.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "services/text/tokenizer.h"

namespace nibble::gateway {

inline constexpr int32_t kByteBos = 256;
inline constexpr int32_t kByteEos = 257;
inline constexpr int32_t kByteVocab = 258;

class ByteStream final : public text::TokenStream {
 public:
  explicit ByteStream(bool skip_special) : skip_special_(skip_special) {}

  absl::StatusOr<std::string> Push(int32_t id) override {
    if (id >= 256) {
      std::string text = *Finish();
      if (!skip_special_) text += id == kByteBos ? "<s>" : "</s>";
      return text;
    }
    held_ += static_cast<char>(id);
    const size_t whole = WholeCharacters(held_);
    std::string text = held_.substr(0, whole);
    held_.erase(0, whole);
    return text;
  }
  absl::StatusOr<std::string> Finish() override {
    std::string text = held_.empty() ? "" : "\uFFFD";
    held_.clear();
    return text;
  }

 private:
  // Tests feed valid text: only a character cut at the end is held back.
  static size_t WholeCharacters(const std::string& text) {
    for (size_t back = 1; back <= 3 && back <= text.size(); ++back) {
      const auto byte = static_cast<unsigned char>(text[text.size() - back]);
      const size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
      if ((byte & 0xC0) == 0x80) continue;
      return length > back ? text.size() - back : text.size();
    }
    return text.size();
  }

  bool skip_special_;
  std::string held_;
};

class ByteTokenizer final : public text::Tokenizer {
 public:
  explicit ByteTokenizer(bool chat = true) : chat_(chat) {}

  static std::vector<int32_t> Ids(std::string_view text) {
    std::vector<int32_t> ids;
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }

  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text, bool add_special,
                                              bool parse_special) const override {
    std::vector<int32_t> ids;
    if (add_special) ids.push_back(kByteBos);
    if (parse_special && text.starts_with("<s>")) {
      ids.push_back(kByteBos);
      text.remove_prefix(3);
    }
    const std::vector<int32_t> rest = Ids(text);
    ids.insert(ids.end(), rest.begin(), rest.end());
    return ids;
  }
  absl::StatusOr<std::string> Decode(std::span<const int32_t> ids,
                                     bool skip_special) const override {
    ByteStream stream(skip_special);
    std::string text;
    for (const int32_t id : ids) text += *stream.Push(id);
    return text + *stream.Finish();
  }
  std::unique_ptr<text::TokenStream> NewStream(bool skip_special) const override {
    return std::make_unique<ByteStream>(skip_special);
  }
  absl::StatusOr<std::string> RenderChat(std::span<const text::ChatMessage> messages,
                                         const text::ChatOptions& options) const override {
    if (!chat_) return absl::FailedPreconditionError("the model has no chat template");
    std::string text;
    for (const text::ChatMessage& message : messages) {
      if (message.content == "refuse") {
        return absl::InvalidArgumentError("the template refuses this");
      }
      text += message.role + ":" + message.content + ";";
    }
    return text + (options.add_generation_prompt ? "assistant:" : "");
  }
  absl::StatusOr<std::vector<int32_t>> EncodeChat(std::span<const text::ChatMessage> messages,
                                                  const text::ChatOptions& options) const override {
    auto text = RenderChat(messages, options);
    if (!text.ok()) return text.status();
    return Encode(*text, /*add_special=*/true, /*parse_special=*/false);
  }

  int32_t vocab_size() const override { return kByteVocab; }
  std::optional<int32_t> TokenId(std::string_view token) const override {
    if (token == "<s>") return kByteBos;
    if (token == "</s>") return kByteEos;
    return std::nullopt;
  }
  absl::StatusOr<std::string> TokenBytes(int32_t id) const override {
    if (id >= kByteVocab) return std::string();
    if (id >= kByteBos) return std::string(id == kByteBos ? "<s>" : "</s>");
    return std::string(1, static_cast<char>(id));
  }
  std::optional<int32_t> bos_id() const override { return kByteBos; }
  std::optional<int32_t> eos_id() const override { return kByteEos; }
  bool has_chat_template() const override { return chat_; }

 private:
  bool chat_;
};

}  // namespace nibble::gateway
