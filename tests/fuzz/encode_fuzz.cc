// Any bytes as text: what is not UTF-8 is refused, and the rest comes back from its token ids.
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>

#include "base/check.h"
#include "services/text/tokenizer.h"

namespace {

using nibble::text::Tokenizer;

std::shared_ptr<const Tokenizer> Load(const char* name) {
  const char* source = std::getenv("NIBBLE_SOURCE_DIR");
  std::ifstream file(std::string(source == nullptr ? "." : source) + "/tests/data/text/" + name,
                     std::ios::binary);
  auto tokenizer =
      Tokenizer::Create({.tokenizer_json = std::string(std::istreambuf_iterator<char>(file), {})});
  CHECK(tokenizer.ok());
  return *std::move(tokenizer);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto byte_level = Load("byte-level-tokenizer.json");
  static const auto stories = Load("stories260k-tokenizer.json");
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto ids = byte_level->Encode(text, true, false);
  const auto story_ids = stories->Encode(text, true, true);
  CHECK(ids.ok() == story_ids.ok());
  if (!ids.ok()) {
    CHECK(ids.status().code() == absl::StatusCode::kInvalidArgument);
    return 0;
  }
  CHECK(byte_level->Decode(*ids, false).value() == text);
  for (const char* special : {"<|im_start|>", "<|im_end|>", "<pad>"}) {
    const int32_t id = byte_level->TokenId(special).value();
    for (const int32_t made : *ids) CHECK(made != id);
  }
  CHECK(byte_level->Encode(text, true, true).ok());
  return 0;
}
