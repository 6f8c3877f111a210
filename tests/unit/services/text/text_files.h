// Tokenizers of the test data, read from disk.
#pragma once

#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/text/tokenizer.h"
#include "tests/support/test_data.h"

namespace nibble::text::testing {

inline std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline nlohmann::json ReadJson(const std::string& path) {
  return nlohmann::json::parse(ReadText(path));
}

// The tokenizer in `folder`; null, with a failed expectation, where it does not load.
inline std::shared_ptr<const Tokenizer> LoadTokenizer(const std::string& folder) {
  auto tokenizer =
      Tokenizer::Create({.tokenizer_json = ReadText(folder + "/tokenizer.json"),
                         .tokenizer_config_json = ReadText(folder + "/tokenizer_config.json"),
                         .chat_template = ReadText(folder + "/chat_template.jinja")});
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

}  // namespace nibble::text::testing
