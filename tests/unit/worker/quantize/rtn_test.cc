#include "worker/quantize/rtn.h"

#include <openssl/sha.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/support/test_data.h"
#include "worker/quantize/round_to_nearest.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/safetensors_writer.h"

namespace nibble::quantize {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::string Sha256(std::span<const std::byte> bytes) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), digest);
  return absl::BytesToHexString({reinterpret_cast<const char*>(digest), sizeof(digest)});
}

std::string Specs(const std::string& name) {
  return nibble::testing::SourceDir() + "/tests/data/model-specs/" + name;
}

class RtnTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = fs::temp_directory_path() / "nibble-rtn-XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    root_ = name;
  }
  void TearDown() override { fs::remove_all(root_); }

  [[nodiscard]] std::string Path(const std::string& name) const { return root_ + "/" + name; }
  [[nodiscard]] size_t EntriesLeft() const {
    return static_cast<size_t>(
        std::distance(fs::directory_iterator(root_), fs::directory_iterator()));
  }

  std::string root_;
};

TEST_F(RtnTest, GivesTheTensorsOfASecondStatementOfTheLaw) {
  for (const char* name : {"llama", "llama-biases", "qwen2-window"}) {
    SCOPED_TRACE(name);
    const auto golden = nlohmann::json::parse(
        ReadAll(nibble::testing::SourceDir() + "/tests/data/rtn/" + name + ".json"));
    RtnOptions options;
    options.input_folder = Specs(name);
    options.output_folder = Path(name);
    options.group_size = golden["group_size"];
    ASSERT_TRUE(QuantizeRtn(options).ok());
    const auto checkpoint = weights::Checkpoint::Open(options.output_folder);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    std::vector<std::string> expected;
    for (const auto& [tensor, digest] : golden["sha256"].items()) {
      expected.push_back(tensor);
      const weights::TensorView* view = (*checkpoint)->Find(tensor);
      ASSERT_NE(view, nullptr) << tensor;
      EXPECT_EQ(Sha256(view->data), digest) << tensor;
    }
    EXPECT_EQ((*checkpoint)->TensorNames(), expected);
    EXPECT_EQ((*checkpoint)->quantization().layout, weights::Layout::kGemm);
    EXPECT_EQ((*checkpoint)->quantization().group_size, options.group_size);
  }
}

TEST_F(RtnTest, BytesDoNotDependOnTheThreads) {
  for (const int32_t threads : {1, 2, 7}) {
    RtnOptions options;
    options.input_folder = Specs("llama");
    options.output_folder = Path(std::to_string(threads));
    options.group_size = 32;
    options.threads = threads;
    ASSERT_TRUE(QuantizeRtn(options).ok());
    EXPECT_EQ(ReadAll(options.output_folder + "/model.safetensors"),
              ReadAll(Path("1") + "/model.safetensors"));
  }
}

TEST_F(RtnTest, ShardsHoldWhatOneFileHolds) {
  RtnOptions options;
  options.input_folder = Specs("qwen3");
  options.output_folder = Path("whole");
  options.group_size = 32;
  ASSERT_TRUE(QuantizeRtn(options).ok());
  options.output_folder = Path("sharded");
  options.shard_bytes_max = 20'000;
  ASSERT_TRUE(QuantizeRtn(options).ok());
  EXPECT_TRUE(fs::exists(Path("sharded") + "/model.safetensors.index.json"));
  const auto whole = weights::Checkpoint::Open(Path("whole"));
  const auto sharded = weights::Checkpoint::Open(Path("sharded"));
  ASSERT_TRUE(whole.ok() && sharded.ok()) << sharded.status();
  EXPECT_EQ((*whole)->TensorNames(), (*sharded)->TensorNames());
  EXPECT_EQ((*whole)->IdentityHash(), (*sharded)->IdentityHash());
  for (const std::string& name : (*whole)->TensorNames()) {
    EXPECT_TRUE(std::ranges::equal((*whole)->Find(name)->data, (*sharded)->Find(name)->data));
  }
}

TEST_F(RtnTest, CopiesTokenizerFilesAndReportsProgress) {
  fs::copy(Specs("llama"), Path("in"));
  std::ofstream(Path("in") + "/tokenizer.json") << "{\"a\": 1}";
  std::ofstream(Path("in") + "/generation_config.json") << "{}";
  std::vector<int64_t> done;
  int64_t total = 0;
  RtnOptions options;
  options.input_folder = Path("in");
  options.output_folder = Path("out/");
  options.group_size = 32;
  options.progress = [&](int64_t bytes_done, int64_t bytes_total) {
    done.push_back(bytes_done);
    total = bytes_total;
  };
  ASSERT_TRUE(QuantizeRtn(options).ok());
  EXPECT_EQ(ReadAll(Path("out") + "/tokenizer.json"), "{\"a\": 1}");
  EXPECT_EQ(ReadAll(Path("out") + "/generation_config.json"), "{}");
  EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
  EXPECT_EQ(done.back(), total);
  EXPECT_EQ(EntriesLeft(), 2u);
}

TEST_F(RtnTest, RefusesWhatItCannotDoAndLeavesNothingBehind) {
  RtnOptions options;
  options.input_folder = Specs("llama");
  options.output_folder = Path("out");
  EXPECT_THAT(std::string(QuantizeRtn(options).message()),
              HasSubstr("model.layers.0.self_attn.q_proj has 64 columns"));
  options.group_size = 48;
  EXPECT_THAT(std::string(QuantizeRtn(options).message()), HasSubstr("group size is 48"));
  options.group_size = 32;
  options.threads = 0;
  EXPECT_THAT(std::string(QuantizeRtn(options).message()), HasSubstr("threads is 0"));
  options.threads = 1;
  options.input_folder = Specs("llama-awq-gemm");
  EXPECT_EQ(QuantizeRtn(options).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(EntriesLeft(), 0u);
  fs::create_directory(Path("out"));
  std::ofstream(Path("out") + "/file") << "x";
  options.input_folder = Specs("llama");
  EXPECT_EQ(QuantizeRtn(options).code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(EntriesLeft(), 1u);
}

// The small checkpoint "llama" with one tensor's values replaced.
void WriteVariant(const std::string& folder, const std::string& tensor, float value) {
  fs::copy(Specs("llama"), folder);
  std::string bytes = ReadAll(folder + "/model.safetensors");
  const auto file = weights::SafetensorsFile::Open(Specs("llama") + "/model.safetensors");
  ASSERT_TRUE(file.ok());
  const auto& tensors = (*file)->tensors();
  const std::byte* first = tensors.begin()->second.data.data();
  for (const auto& [name, view] : tensors) first = std::min(first, view.data.data());
  uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  const auto offset = tensors.at(tensor).data.data() - first;
  std::memcpy(bytes.data() + 8 + header + offset, &value, sizeof(value));
  std::ofstream(folder + "/model.safetensors", std::ios::binary | std::ios::trunc) << bytes;
}

TEST_F(RtnTest, NamesATensorWhoseValuesDoNotFit) {
  struct Case {
    const char* tensor;
    float value;
    const char* said;
  };
  const Case cases[] = {
      {"model.norm.weight", 1e6f, "allowed: -65504"},
      {"model.layers.1.mlp.up_proj.weight", 2e6f, "beyond fp16"},
      {"model.layers.1.mlp.up_proj.weight", std::numeric_limits<float>::infinity(), "not finite"},
      {"lm_head.weight", std::numeric_limits<float>::quiet_NaN(), "not finite"},
  };
  int index = 0;
  for (const Case& bad : cases) {
    RtnOptions options;
    options.input_folder = Path("in" + std::to_string(index++));
    WriteVariant(options.input_folder, bad.tensor, bad.value);
    options.output_folder = Path("out");
    options.group_size = 32;
    options.threads = 2;
    const std::string said(QuantizeRtn(options).message());
    EXPECT_THAT(said, HasSubstr(bad.said));
    EXPECT_THAT(said, HasSubstr(std::string(bad.tensor).substr(0, 20)));
    EXPECT_FALSE(fs::exists(Path("out")));
  }
}

TEST(RoundToNearestTest, HandlesFlatAndOneSidedGroups) {
  weights::LogicalLinear dense;
  dense.rows = 8;
  dense.columns = 32;
  dense.dense.assign(8 * 32, 0.0f);
  std::fill_n(dense.dense.begin() + 32, 32, 0.75f);   // flat and positive: z = 0, q clamps at 15
  std::fill_n(dense.dense.begin() + 64, 32, -0.75f);  // flat and negative: z clamps at 15
  for (int i = 0; i < 32; ++i) dense.dense[96 + i] = 1.0f + static_cast<float>(i) / 32;
  const auto result = RoundToNearest(dense, 32);
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(result->zeros[0], 0);
  EXPECT_EQ(result->zeros[1], 0);
  EXPECT_EQ(result->q[32], 15);
  EXPECT_EQ(result->zeros[2], 15);
  EXPECT_EQ(result->q[64], 0);
  EXPECT_EQ(result->zeros[3], 0);
  for (const float scale : result->scales) EXPECT_GT(scale, 0);
}

}  // namespace
}  // namespace nibble::quantize
