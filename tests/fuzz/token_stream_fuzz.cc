// Any token ids, streamed: the pieces are whole characters and add up to the whole decode.
//
// Input: a byte that picks tokenizer and settings, then two bytes per token id.
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <span>
#include <string>
#include <vector>

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

// Appends a piece. Encode refuses what is not UTF-8, which a piece must be by itself.
void Append(const Tokenizer& tokenizer, const absl::StatusOr<std::string>& piece,
            std::string& all) {
  CHECK(piece.ok());
  CHECK(tokenizer.Encode(*piece, false, false).ok());
  all += *piece;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::shared_ptr<const Tokenizer> tokenizers[] = {Load("byte-level-tokenizer.json"),
                                                                Load("stories260k-tokenizer.json")};
  if (size == 0) return 0;
  const Tokenizer& tokenizer = *tokenizers[data[0] & 1];
  const bool skip_special = (data[0] & 2) != 0;
  std::vector<int32_t> ids;
  for (size_t i = 1; i + 1 < size; i += 2) {
    ids.push_back((data[i] | data[i + 1] << 8) % (tokenizer.vocab_size() + 3) - 1);
  }
  // The ids before `split` count as another text's.
  const size_t split = (data[0] & 4) != 0 ? ids.size() / 2 : 0;
  const auto before = std::span(ids).first(split);
  const auto stream = tokenizer.NewStreamAfter(before, skip_special);
  std::string all;
  for (const int32_t id : std::span(ids).subspan(split)) {
    Append(tokenizer, stream->Push(id), all);
  }
  Append(tokenizer, stream->Finish(), all);
  const auto whole = tokenizer.Decode(ids, skip_special);
  CHECK(whole.ok());
  CHECK(split == 0 ? *whole == all : whole->ends_with(all));
  return 0;
}
