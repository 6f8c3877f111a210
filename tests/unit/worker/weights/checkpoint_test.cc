#include "worker/weights/checkpoint.h"

#include <sys/stat.h>

#include <filesystem>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tensor_files.h"
#include "tests/support/test_data.h"
#include "worker/weights/float_types.h"

namespace nibble::weights {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kHidden = 32;
constexpr int kVocab = 64;
constexpr char kQ[] = "model.layers.0.self_attn.q_proj";

json Config() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", kHidden},
          {"intermediate_size", 64},
          {"num_hidden_layers", 1},
          {"num_attention_heads", 2},
          {"vocab_size", kVocab}};
}

std::vector<float> Ramp(int count, float step) {
  std::vector<float> values(count);
  for (int i = 0; i < count; ++i) values[i] = static_cast<float>(i) * step;
  return values;
}

TestTensor Dense(const std::string& name, std::vector<int64_t> shape, float step = 0.25f) {
  int64_t count = 1;
  for (const int64_t dimension : shape) count *= dimension;
  return {name, "F32", std::move(shape), BytesOf(Ramp(static_cast<int>(count), step))};
}

class CheckpointTest : public FolderTest {
 protected:
  void SetUp() override {
    FolderTest::SetUp();
    WriteAll(Path("config.json"), Config().dump());
  }

  [[nodiscard]] std::unique_ptr<Checkpoint> Open() const {
    auto checkpoint = Checkpoint::Open(root_);
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    return checkpoint.ok() ? *std::move(checkpoint) : nullptr;
  }
  [[nodiscard]] std::string Refusal() const {
    const auto checkpoint = Checkpoint::Open(root_);
    EXPECT_FALSE(checkpoint.ok());
    return checkpoint.status().ToString();
  }
  void WriteIndex(const json& weight_map) const {
    WriteAll(Path("model.safetensors.index.json"), json{{"weight_map", weight_map}}.dump());
  }
};

TEST_F(CheckpointTest, ReadsDenseLayersInEveryFloatType) {
  const std::vector<float> values = Ramp(kHidden * kHidden, 0.5f);
  std::vector<uint16_t> half, brain;
  for (const float value : values) {
    half.push_back(FloatToHalf(value));
    brain.push_back(static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16));
  }
  const struct {
    const char* name;
    FloatType type;
    std::string data;
  } cases[] = {{"F32", FloatType::kF32, BytesOf(values)},
               {"F16", FloatType::kF16, BytesOf(half)},
               {"BF16", FloatType::kBF16, BytesOf(brain)}};
  for (const auto& stored : cases) {
    // A tensor of one byte in front: data need not be aligned.
    WriteAll(Path("model.safetensors"),
             FileOf({{"a", "U8", {1}, "x"},
                     {std::string(kQ) + ".weight", stored.name, {kHidden, kHidden}, stored.data}}));
    const auto linear = Open()->LoadLinear(kQ);
    ASSERT_TRUE(linear.ok()) << linear.status();
    EXPECT_FALSE(linear->quantized());
    EXPECT_EQ(linear->stored_type, stored.type);
    EXPECT_EQ(linear->dense[5], 2.5f);
    EXPECT_EQ(linear->dense[1023], stored.type == FloatType::kBF16 ? 510.0f : 511.5f);
  }
}

TEST_F(CheckpointTest, OtherTypesAreNotWeights) {
  WriteAll(Path("model.safetensors"), FileOf({{std::string(kQ) + ".weight",
                                               "F64",
                                               {kHidden, kHidden},
                                               std::string(kHidden * kHidden * 8, '\0')}}));
  EXPECT_THAT(Open()->LoadLinear(kQ).status().ToString(),
              AllOf(HasSubstr("type is F64"), HasSubstr("F16, BF16, F32")));
}

TEST_F(CheckpointTest, LoadDenseChecksShapeAndValues) {
  WriteAll(Path("model.safetensors"), FileOf({Dense("model.norm.weight", {kHidden})}));
  const auto checkpoint = Open();
  EXPECT_EQ(checkpoint->LoadDense("model.norm.weight", {kHidden})->at(3), 0.75f);
  EXPECT_THAT(checkpoint->LoadDense("model.norm.weight", {7}).status().ToString(),
              AllOf(HasSubstr("model.safetensors"), HasSubstr("model.norm.weight"),
                    HasSubstr("shape is [32]; allowed: [7]")));
  EXPECT_THAT(checkpoint->LoadDense("absent", {7}).status().ToString(),
              HasSubstr("\"absent\" is missing"));
}

TEST_F(CheckpointTest, TheHeadIsTheEmbeddingOnlyWhereTheyAreTied) {
  const TestTensor embedding = Dense("model.embed_tokens.weight", {kVocab, kHidden}, 0.5f);
  const TestTensor head = Dense("lm_head.weight", {kVocab, kHidden}, 0.25f);
  WriteAll(Path("model.safetensors"), FileOf({embedding, head}));
  EXPECT_EQ(Open()->LoadHead()->dense[1], 0.25f);
  json config = Config();
  config["tie_word_embeddings"] = true;
  WriteAll(Path("config.json"), config.dump());
  EXPECT_EQ(Open()->LoadHead()->dense[1], 0.5f);
  WriteAll(Path("model.safetensors"), FileOf({embedding}));
  EXPECT_EQ(Open()->LoadHead()->name, "lm_head");
  WriteAll(Path("config.json"), Config().dump());
  EXPECT_THAT(Open()->LoadHead().status().ToString(), HasSubstr("lm_head"));
}

TEST_F(CheckpointTest, AQuantizedHeadIsRead) {
  const std::string folder =
      nibble::testing::SourceDir() + "/tests/data/model-specs/qwen2-awq-quantized-head";
  const auto checkpoint = Checkpoint::Open(folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto head = (*checkpoint)->LoadHead();
  ASSERT_TRUE(head.ok()) << head.status();
  EXPECT_EQ(head->group_size, 64);
  EXPECT_EQ(head->rows, 256);
  EXPECT_EQ((*checkpoint)->DescribeHead()->layout, Layout::kGemm);
}

TEST_F(CheckpointTest, BiasesFollowTheArchitecture) {
  const TestTensor weight = Dense(std::string(kQ) + ".weight", {kHidden, kHidden});
  const TestTensor bias = Dense(std::string(kQ) + ".bias", {kHidden});
  WriteAll(Path("model.safetensors"), FileOf({weight, bias}));
  EXPECT_THAT(Open()->LoadLinear(kQ).status().ToString(),
              AllOf(HasSubstr(".bias"), HasSubstr("gives this layer no bias")));
  WriteAll(Path("model.safetensors"),
           FileOf({weight, Dense(std::string(kQ) + ".bias", {kHidden}, 0)}));
  EXPECT_TRUE(Open()->LoadLinear(kQ)->bias.empty());

  json config = Config();
  config["attention_bias"] = true;
  WriteAll(Path("config.json"), config.dump());
  WriteAll(Path("model.safetensors"), FileOf({weight, bias}));
  EXPECT_EQ(Open()->LoadLinear(kQ)->bias[4], 1.0f);
  EXPECT_TRUE(Open()->DescribeLinear(kQ)->has_bias);
  WriteAll(Path("model.safetensors"), FileOf({weight}));
  EXPECT_THAT(Open()->LoadLinear(kQ).status().ToString(),
              AllOf(HasSubstr(".bias"), HasSubstr("missing")));
  WriteAll(Path("model.safetensors"), FileOf({weight, Dense(std::string(kQ) + ".bias", {3})}));
  EXPECT_THAT(Open()->LoadLinear(kQ).status().ToString(), HasSubstr("shape is [3]"));
}

TEST_F(CheckpointTest, ShardsAreOneCheckpoint) {
  WriteAll(Path("one.safetensors"), FileOf({Dense("a", {2})}));
  WriteAll(Path("two.safetensors"), FileOf({Dense("b", {3}), Dense("c", {1})}));
  WriteIndex({{"a", "one.safetensors"}, {"b", "two.safetensors"}, {"c", "two.safetensors"}});
  const auto checkpoint = Open();
  EXPECT_EQ(checkpoint->TensorNames(), (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(checkpoint->LoadDense("b", {3})->at(2), 0.5f);
  EXPECT_EQ(checkpoint->Find("z"), nullptr);
}

TEST_F(CheckpointTest, AnIndexMayNotLeaveTheFolder) {
  WriteAll(Path("one.safetensors"), FileOf({Dense("a", {2})}));
  const std::string outside = root_ + "-outside.safetensors";
  WriteAll(outside, FileOf({Dense("a", {2})}));
  const std::vector<std::string> names = {"../" + fs::path(outside).filename().string(),
                                          outside,
                                          "sub/one.safetensors",
                                          "./one.safetensors",
                                          "..",
                                          ".",
                                          "",
                                          "/dev/zero",
                                          std::string("one\0two", 7)};
  for (const std::string& name : names) {
    WriteIndex({{"a", name}});
    EXPECT_THAT(Refusal(), AllOf(HasSubstr("model.safetensors.index.json"),
                                 HasSubstr("is not the name of a file in the model folder")));
  }
  fs::create_symlink(outside, Path("link.safetensors"));
  WriteIndex({{"a", "link.safetensors"}});
  EXPECT_THAT(Refusal(),
              AllOf(HasSubstr("link.safetensors"), HasSubstr("leaves the model folder")));
  fs::create_symlink("../" + fs::path(outside).filename().string(), Path("model.safetensors"));
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("model.safetensors"), HasSubstr("leaves")));
  fs::remove(Path("model.safetensors"));
  fs::remove(outside);
  // Within the folder a link is only another name.
  fs::remove(Path("link.safetensors"));
  fs::create_symlink("one.safetensors", Path("link.safetensors"));
  EXPECT_EQ(Open()->TensorNames(), std::vector<std::string>{"a"});
}

TEST_F(CheckpointTest, WrongIndexesNameWhatIsWrong) {
  WriteAll(Path("one.safetensors"), FileOf({Dense("a", {2})}));
  WriteAll(Path("two.safetensors"), FileOf({Dense("a", {2})}));
  WriteIndex({{"a", "three.safetensors"}});
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("DATA_LOSS"), HasSubstr("three.safetensors")));
  WriteIndex({{"b", "one.safetensors"}});
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("\"b\""), HasSubstr("is not in \"one.safetensors\"")));
  WriteIndex({{"a", 3}});
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("\"a\""), HasSubstr("not a string")));
  WriteAll(Path("three.safetensors"), FileOf({Dense("a", {2}), Dense("b", {1})}));
  WriteIndex({{"a", "one.safetensors"}, {"b", "three.safetensors"}});
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("\"a\""), HasSubstr("in both one.safetensors")));
  const std::string index = Path("model.safetensors.index.json");
  WriteAll(index, R"({"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}})");
  EXPECT_THAT(Refusal(), HasSubstr("\"a\" appears twice"));
  WriteAll(index, R"({"weight_map": []})");
  EXPECT_THAT(Refusal(), HasSubstr("weight_map is missing"));
  WriteAll(index, "[]");
  EXPECT_THAT(Refusal(), HasSubstr("weight_map is missing"));
  WriteAll(index, "{");
  EXPECT_THAT(Refusal(), HasSubstr("not valid JSON"));
  WriteAll(index, std::string(100'000, '['));
  EXPECT_THAT(Refusal(), HasSubstr("nested deeper"));
  fs::remove(index);
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("NOT_FOUND"), HasSubstr("only safetensors")));
}

TEST_F(CheckpointTest, DamagedFilesAreNamed) {
  const std::string file = FileOf({Dense("model.norm.weight", {kHidden})});
  WriteAll(Path("model.safetensors"), file.substr(0, file.size() - 1));
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("DATA_LOSS"), HasSubstr("model.safetensors: "),
                               HasSubstr("model.norm.weight")));
  fs::remove(Path("model.safetensors"));
  ASSERT_EQ(mkfifo(Path("model.safetensors").c_str(), 0600), 0);  // and no waiting for a writer
  EXPECT_THAT(Refusal(), HasSubstr("not a regular file"));
  fs::remove(Path("model.safetensors"));
  fs::create_directory(Path("model.safetensors"));
  EXPECT_THAT(Refusal(), HasSubstr("not a regular file"));
}

TEST_F(CheckpointTest, DamagedConfigsAreNamed) {
  WriteAll(Path("model.safetensors"), FileOf({Dense("a", {2})}));
  const std::string config = Config().dump();
  for (size_t length = 0; length < config.size(); ++length) {
    WriteAll(Path("config.json"), config.substr(0, length));
    EXPECT_THAT(Refusal(), HasSubstr("config.json"));
  }
  WriteAll(Path("config.json"), R"({"vocab_size": 1, "vocab_size": 2})");
  EXPECT_THAT(Refusal(), HasSubstr("\"vocab_size\" appears twice"));
  WriteAll(Path("config.json"), "\xEF\xBB\xBF" + config);
  EXPECT_THAT(Refusal(), HasSubstr("byte-order mark"));
  WriteAll(Path("config.json"), R"({"a": 1e400})");
  EXPECT_THAT(Refusal(), HasSubstr("not valid JSON"));
  fs::remove(Path("config.json"));
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("NOT_FOUND"), HasSubstr("config.json")));
  ASSERT_EQ(mkfifo(Path("config.json").c_str(), 0600), 0);
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("config.json"), HasSubstr("not a regular file")));
  fs::remove(Path("config.json"));
  WriteAll(Path("config.json"), config);
  WriteAll(Path("generation_config.json"), "[]");
  EXPECT_THAT(Refusal(), HasSubstr("generation_config.json is not a JSON object"));
}

TEST_F(CheckpointTest, FlippedBitsOfAConfigNeverCrash) {
  WriteAll(Path("model.safetensors"), FileOf({Dense("a", {2})}));
  json full = Config();
  full["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 4.0}};
  full["quantization_config"] = {{"quant_method", "awq"}, {"bits", 4}, {"group_size", 64}};
  const std::string config = full.dump();
  for (size_t bit = 0; bit < config.size() * 8; bit += 3) {
    std::string flipped = config;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    WriteAll(Path("config.json"), flipped);
    const auto checkpoint = Checkpoint::Open(root_);
    if (!checkpoint.ok()) {
      EXPECT_THAT(std::string(checkpoint.status().message()), HasSubstr("config.json"));
    }
  }
}

TEST_F(CheckpointTest, SmallFilesAreReadWithinTheirLimit) {
  WriteAll(Path("model.safetensors"), FileOf({Dense("a", {2})}));
  WriteAll(Path("tokenizer.json"), "{\"x\": 1}");
  WriteAll(Path("generation_config.json"), R"({"eos_token_id": [1, 2]})");
  const auto checkpoint = Open();
  EXPECT_EQ(*checkpoint->ReadFile("tokenizer.json", 8), "{\"x\": 1}");
  EXPECT_EQ(checkpoint->ReadFile("tokenizer.json", 7).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(checkpoint->ReadFile("absent", 7).status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(checkpoint->ReadFile("../x", 7).ok());
  EXPECT_EQ(checkpoint->generation_config()["eos_token_id"].size(), 2u);
}

TEST_F(CheckpointTest, OldSideFilesSayHowItIsQuantized) {
  WriteAll(Path("model.safetensors"), FileOf({Dense("a", {2})}));
  for (const char* name : {"quantize_config.json", "quant_config.json"}) {
    WriteAll(Path(name),
             R"({"zero_point": true, "q_group_size": 64, "w_bit": 4, "version": "GEMV"})");
    EXPECT_EQ(Open()->quantization().layout, Layout::kGemv);
    EXPECT_EQ(Open()->quantization().group_size, 64);
    fs::remove(Path(name));
  }
  EXPECT_EQ(Open()->quantization().layout, Layout::kNone);
}

TEST_F(CheckpointTest, IdentityChangesWithConfigAndShapesOnly) {
  WriteAll(Path("model.safetensors"), FileOf({Dense("a", {2, 3}), Dense("b", {1})}));
  const uint64_t identity = Open()->IdentityHash();
  WriteAll(Path("model.safetensors"), FileOf({Dense("b", {1}, 7), Dense("a", {2, 3}, 9)}));
  EXPECT_EQ(Open()->IdentityHash(), identity);
  WriteAll(Path("model.safetensors"), FileOf({Dense("a", {3, 2}), Dense("b", {1})}));
  EXPECT_NE(Open()->IdentityHash(), identity);
  WriteAll(Path("model.safetensors"), FileOf({Dense("a", {2, 3}), Dense("c", {1})}));
  EXPECT_NE(Open()->IdentityHash(), identity);
  WriteAll(Path("model.safetensors"), FileOf({Dense("a", {2, 3}), Dense("b", {1})}));
  json config = Config();
  config["rope_theta"] = 20000.0;
  WriteAll(Path("config.json"), config.dump());
  EXPECT_NE(Open()->IdentityHash(), identity);
}

}  // namespace
}  // namespace nibble::weights
