// Every on-disk layout, written by the libraries that define them, gives the expected weights.
#include <openssl/sha.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/support/test_data.h"
#include "worker/weights/checkpoint.h"

namespace nibble::weights {
namespace {

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::string Sha256(const std::vector<float>& values) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(values.data()), values.size() * sizeof(float),
         digest);
  return absl::BytesToHexString({reinterpret_cast<const char*>(digest), sizeof(digest)});
}

// The fp32 values of a version-1 .npy file.
std::vector<float> ReadNpy(const std::string& path) {
  const std::string bytes = ReadAll(path);
  uint16_t header = 0;
  std::memcpy(&header, bytes.data() + 8, sizeof(header));
  std::vector<float> values((bytes.size() - 10 - header) / sizeof(float));
  std::memcpy(values.data(), bytes.data() + 10 + header, values.size() * sizeof(float));
  return values;
}

struct Sample {
  const char* folder;
  const char* expected;
  Layout layout;
};

class LayoutSamplesTest : public ::testing::TestWithParam<Sample> {};

TEST_P(LayoutSamplesTest, DequantizesToTheExpectedMatrices) {
  const Sample& sample = GetParam();
  const auto root = testing::TestData("models/awq-layout-samples", "LayoutSamplesTest");
  if (!root.has_value()) return;
  const auto checkpoint = Checkpoint::Open(*root + "/" + sample.folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const std::string expected = *root + "/" + sample.expected + "/";
  const auto manifest = nlohmann::json::parse(ReadAll(expected + "manifest.json"));
  ASSERT_EQ(manifest.size(), 3u);
  for (const auto& [name, entry] : manifest.items()) {
    SCOPED_TRACE(name);
    const auto info = (*checkpoint)->DescribeLinear(name);
    ASSERT_TRUE(info.ok()) << info.status();
    EXPECT_EQ(info->layout, sample.layout);
    const auto linear = (*checkpoint)->LoadLinear(name);
    ASSERT_TRUE(linear.ok()) << linear.status();
    EXPECT_EQ(linear->rows, entry["shape"][0]);
    EXPECT_EQ(linear->columns, entry["shape"][1]);
    EXPECT_EQ(linear->group_size, 64);
    EXPECT_EQ(linear->stored_type, FloatType::kF16);
    const std::vector<float> values = Dequantize(*linear);
    EXPECT_EQ(Sha256(values), entry["sha256_fp32_full"]);
    const std::vector<float> rows = ReadNpy(expected + entry["file"].get<std::string>());
    ASSERT_EQ(rows.size(), 128u * linear->columns);
    int64_t different = 0;
    for (size_t i = 0; i < rows.size(); ++i) different += rows[i] == values[i] ? 0 : 1;
    EXPECT_EQ(different, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(AllLayouts, LayoutSamplesTest,
                         ::testing::Values(Sample{"gemm", "expected-asym", Layout::kGemm},
                                           Sample{"gemv", "expected-asym", Layout::kGemv},
                                           Sample{"gemv_fast", "expected-asym", Layout::kGemvFast},
                                           Sample{"llm-awq", "expected-asym", Layout::kLlmAwq},
                                           Sample{"marlin", "expected-sym", Layout::kMarlin},
                                           Sample{"compressed-tensors-asym", "expected-asym",
                                                  Layout::kCompressedTensors},
                                           Sample{"compressed-tensors-sym", "expected-sym",
                                                  Layout::kCompressedTensors}),
                         [](const auto& parameter) {
                           std::string name = parameter.param.folder;
                           for (char& c : name) c = c == '-' ? '_' : c;
                           return name;
                         });

}  // namespace
}  // namespace nibble::weights
