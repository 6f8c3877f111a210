// Tokenizers of the test data, read from disk.
#pragma once

#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <string>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/text/tokenizer.h"
#include "tests/support/test_data.h"

namespace nibble::text::testing {

// Empty where there is no such file.
inline std::string ReadText(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

// Keeps the order of keys, which templates show.
inline nlohmann::ordered_json ReadJson(const std::string& path) {
  return nlohmann::ordered_json::parse(ReadText(path));
}

// A file that the repository holds.
inline std::string DataPath(const std::string& name) {
  return nibble::testing::SourceDir() + "/tests/data/text/" + name;
}

// Null, with a failed expectation, where it does not load.
inline std::shared_ptr<const Tokenizer> MakeTokenizer(const TokenizerFiles& files) {
  auto tokenizer = Tokenizer::Create(files);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return tokenizer.ok() ? *std::move(tokenizer) : nullptr;
}

inline std::shared_ptr<const Tokenizer> LoadTokenizer(const std::string& folder) {
  return MakeTokenizer({.tokenizer_json = ReadText(folder + "/tokenizer.json"),
                        .tokenizer_config_json = ReadText(folder + "/tokenizer_config.json"),
                        .chat_template = ReadText(folder + "/chat_template.jinja")});
}

// The tokenizer that token-vectors.json calls `name`: "byte-level", "stories260k", or "@" and a
// folder of the larger test data. Null where that is absent, which is announced for `tests`.
inline std::shared_ptr<const Tokenizer> NamedTokenizer(const std::string& name, const char* tests) {
  if (!name.starts_with("@")) {
    return MakeTokenizer({.tokenizer_json = ReadText(DataPath(name + "-tokenizer.json"))});
  }
  const auto folder = nibble::testing::TestData(name.substr(1), tests);
  return folder ? LoadTokenizer(*folder) : nullptr;
}

inline constexpr const char* kTokenizerNames[] = {"byte-level", "stories260k",
                                                  "@models/smollm2-135m-awq-gemm-g64",
                                                  "@tokenizers/qwen3", "@tokenizers/mistral-v1"};

}  // namespace nibble::text::testing
