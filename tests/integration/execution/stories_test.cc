// A real model of which nothing is quantized: stories260K, turned into a Hugging Face folder by
// tools/models, writes what llama2.c writes.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "tests/support/in_process_group.h"
#include "tests/support/test_data.h"

namespace nibble {
namespace {

using testing::InProcessGroup;

constexpr int32_t kBos = 1;
constexpr int32_t kSteps = 200;
constexpr const char* kTests = "StoriesTest";

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// A Python that has what tools/models needs.
std::optional<std::string> FindPython() {
  const std::string root = testing::SourceDir();
  const char* given = std::getenv("NIBBLE_PYTHON");
  for (const std::string& python :
       {std::string(given != nullptr ? given : ""), root + "/.venv/bin/python",
        root + "/.cache/models-venv/bin/python", std::string("python3")}) {
    if (python.empty()) continue;
    const std::string command = "'" + python + "' -c 'import numpy, safetensors' 2>/dev/null";
    if (std::system(command.c_str()) == 0) return python;
  }
  std::fprintf(stderr, "NOT RUN: %s (no Python with numpy and safetensors; see tools/models)\n",
               kTests);
  return std::nullopt;
}

// llama2.c's vocabulary file: the longest piece's length, then score, length and bytes of each.
std::vector<std::string> ReadPieces(const std::string& path) {
  const std::string file = ReadAll(path);
  std::vector<std::string> pieces;
  for (size_t at = 4; at + 8 <= file.size();) {
    int32_t length = 0;
    std::memcpy(&length, file.data() + at + 4, sizeof(length));
    pieces.push_back(file.substr(at + 8, static_cast<size_t>(length)));
    at += 8 + static_cast<size_t>(length);
  }
  return pieces;
}

// As llama2.c prints: the space after BOS goes, byte tokens are bytes.
std::string TextOf(const std::vector<int32_t>& tokens, const std::vector<std::string>& pieces) {
  std::string text;
  int32_t previous = kBos;
  for (const int32_t token : tokens) {
    if (token == kBos) break;
    std::string piece = pieces[static_cast<size_t>(token)];
    if (previous == kBos && piece.starts_with(' ')) piece.erase(0, 1);
    unsigned byte = 0;
    if (std::sscanf(piece.c_str(), "<0x%02X>", &byte) == 1) {
      piece = static_cast<char>(byte);
    }
    text += piece;
    previous = token;
  }
  return text;
}

class StoriesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    data_ = testing::TestData("models/stories260K", kTests);
    if (!data_.has_value()) return;
    const std::optional<std::string> python = FindPython();
    if (!python.has_value()) return;
    folder_ = ::testing::TempDir() + "stories260K-" + std::to_string(getpid());
    const std::string command = "'" + *python + "' '" + testing::SourceDir() +
                                "/tools/models/stories260k_to_hf.py' '" + *data_ +
                                "/stories260K.bin' '" + *data_ + "/tok512.bin' '" + folder_ + "'";
    ASSERT_EQ(std::system(command.c_str()), 0) << command;
    converted_ = true;
  }
  void TearDown() override {
    if (converted_) std::filesystem::remove_all(folder_);
  }

  std::optional<std::string> data_;
  std::string folder_;
  bool converted_ = false;
};

TEST_F(StoriesTest, EveryDegreeWritesTheGoldenStory) {
  if (!converted_) return;
  const std::string golden = ReadAll(*data_ + "/greedy-200-tokens.txt");
  const std::vector<std::string> pieces = ReadPieces(*data_ + "/tok512.bin");
  step::SamplingParams greedy;
  greedy.temperature = 0;
  std::vector<int32_t> first;
  for (const int32_t ranks : {1, 2, 3, 4, 8}) {
    InProcessGroup::Options options{.ranks = ranks};
    options.memory.numerics = weights::Numerics::kExact;
    InProcessGroup group(folder_, options);
    const std::vector<int32_t> tokens =
        group.Generate({.prompt = {kBos}, .sampling = greedy, .count = kSteps}).tokens;
    EXPECT_EQ(TextOf(tokens, pieces), golden) << ranks << " ranks";
    if (first.empty()) first = tokens;
    EXPECT_EQ(tokens, first) << ranks << " ranks";
  }
}

}  // namespace
}  // namespace nibble
