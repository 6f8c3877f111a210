// Layouts at other group sizes than the samples', packed here by the laws' forward direction, and
// what is refused.
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tensor_files.h"
#include "worker/weights/checkpoint.h"
#include "worker/weights/float_types.h"

namespace nibble::weights {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kRows = 64;
constexpr int kColumns = 256;
constexpr char kLayer[] = "model.layers.0.mlp.down_proj";

std::string Name(const char* suffix) { return std::string(kLayer) + "." + suffix; }

json Config(const json& quantization) {
  json config = {{"architectures", {"LlamaForCausalLM"}},
                 {"hidden_size", kRows},
                 {"intermediate_size", kColumns},
                 {"num_hidden_layers", 1},
                 {"num_attention_heads", 4},
                 {"vocab_size", 64}};
  if (!quantization.is_null()) config["quantization_config"] = quantization;
  return config;
}

// Random q, z and s of the layer; group -1 is the whole row.
struct Values {
  explicit Values(int group, bool symmetric = false)
      : config_group(group), size(group < 0 ? kColumns : group), count(kColumns / size) {
    std::mt19937 random(17);
    for (int i = 0; i < kRows * kColumns; ++i) q.push_back(static_cast<uint8_t>(random() % 16));
    for (int i = 0; i < kRows * count; ++i) {
      z.push_back(symmetric ? 8 : static_cast<uint8_t>(random() % 16));
      s.push_back(static_cast<float>(random() % 1000 + 24) / 4096);
    }
  }
  [[nodiscard]] uint32_t Q(int n, int k) const { return q[n * kColumns + k]; }
  [[nodiscard]] uint32_t Z(int n, int g) const { return z[n * count + g]; }
  [[nodiscard]] uint16_t S(int n, int g) const { return FloatToHalf(s[n * count + g]); }

  int config_group;
  int size;
  int count;
  std::vector<uint8_t> q, z;
  std::vector<float> s;
};

json Awq(const char* version, int group) {
  return {{"quant_method", "awq"}, {"version", version}, {"bits", 4}, {"group_size", group}};
}

std::vector<TestTensor> Gemm(const Values& v) {
  constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  std::vector<uint32_t> weight(kColumns * kRows / 8), zeros(v.count * kRows / 8);
  std::vector<uint16_t> scales(v.count * kRows);
  for (int c = 0; c < kRows / 8; ++c) {
    for (int i = 0; i < 8; ++i) {
      const int n = 8 * c + kOrder[i];
      for (int k = 0; k < kColumns; ++k) weight[k * kRows / 8 + c] |= v.Q(n, k) << 4 * i;
      for (int g = 0; g < v.count; ++g) zeros[g * kRows / 8 + c] |= v.Z(n, g) << 4 * i;
    }
  }
  for (int g = 0; g < v.count; ++g) {
    for (int n = 0; n < kRows; ++n) scales[g * kRows + n] = v.S(n, g);
  }
  return {{Name("qweight"), "I32", {kColumns, kRows / 8}, BytesOf(weight)},
          {Name("qzeros"), "I32", {v.count, kRows / 8}, BytesOf(zeros)},
          {Name("scales"), "F16", {v.count, kRows}, BytesOf(scales)}};
}

int ZeroWords(const Values& v) {
  const int words = (v.count + 7) / 8;
  const int unit = v.size >= 128 ? 1 : v.size == 64 ? 2 : 4;
  return (words + unit - 1) / unit * unit;
}

std::vector<TestTensor> Gemv(const Values& v) {
  const int words = ZeroWords(v);
  std::vector<uint32_t> weight(kRows * kColumns / 8), zeros(kRows * words);
  std::vector<uint16_t> scales(kRows * words * 8);
  for (int n = 0; n < kRows; ++n) {
    for (int k = 0; k < kColumns; ++k) weight[(n * kColumns + k) / 8] |= v.Q(n, k) << 4 * (k % 8);
    for (int g = 0; g < v.count; ++g) {
      zeros[n * words + g / 8] |= v.Z(n, g) << 4 * (g % 8);
      scales[n * words * 8 + g] = v.S(n, g);
    }
  }
  return {{Name("qweight"), "I32", {kRows, kColumns / 8}, BytesOf(weight)},
          {Name("qzeros"), "I32", {kRows, words}, BytesOf(zeros)},
          {Name("scales"), "F16", {kRows, words * 8}, BytesOf(scales)}};
}

std::vector<TestTensor> GemvFast(const Values& v, const char* zeros_name) {
  const int lines = 8 * ZeroWords(v);
  std::vector<uint16_t> weight(kRows / 4 * kColumns), scales(lines * kRows), zeros(lines * kRows);
  for (int n = 0; n < kRows; ++n) {
    for (int k = 0; k < kColumns; ++k) {
      const int t = k / 64, kk = k % 64, h = kk / 32, z = kk % 32;
      const int m = 4 * (z % 2) + z / 8;
      const int e = 32 * h + 8 * (z % 8 / 2) + m;
      const int column = 64 * t + 16 * (n % 4) + e / 4;
      weight[n / 4 * kColumns + column] =
          static_cast<uint16_t>(weight[n / 4 * kColumns + column] | v.Q(n, k) << 4 * (e % 4));
    }
    for (int g = 0; g < v.count; ++g) {
      scales[g * kRows + n] = v.S(n, g);
      zeros[g * kRows + n] = FloatToHalf(-HalfToFloat(v.S(n, g)) * static_cast<float>(v.Z(n, g)));
    }
  }
  return {{Name("qweight"), "I16", {kRows / 4, kColumns}, BytesOf(weight)},
          {Name(zeros_name), "F16", {lines, kRows}, BytesOf(zeros)},
          {Name("scales"), "F16", {lines, kRows}, BytesOf(scales)}};
}

std::vector<TestTensor> Marlin(const Values& v) {
  constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  constexpr int kWholeRow[8] = {0, 1, 8, 9, 16, 17, 24, 25};
  std::vector<uint32_t> weight(kColumns / 16 * 2 * kRows);
  for (int tile = 0; tile < kColumns / 16; ++tile) {
    for (int w = 0; w < 2 * kRows; ++w) {
      const int lane = w % 128 / 4;
      for (int i = 0; i < 8; ++i) {
        const int half = kOrder[i] / 4, r = kOrder[i] % 4;
        const int n = 64 * (w / 128) + 16 * (w % 4) + 8 * half + lane / 4;
        const int k = 16 * tile + 2 * (lane % 4) + r % 2 + 8 * (r / 2);
        weight[tile * 2 * kRows + w] |= v.Q(n, k) << 4 * i;
      }
    }
  }
  std::vector<uint16_t> scales(v.count * kRows);
  for (int g = 0; g < v.count; ++g) {
    for (int place = 0; place < kRows; ++place) {
      const int b64 = place / 64, i64 = place % 64 / 8, j = place % 8;
      const int b32 = place / 32, i32 = place % 32 / 8;
      const int n = v.size < kColumns ? 64 * b64 + i64 + 8 * j : 32 * b32 + 2 * i32 + kWholeRow[j];
      scales[g * kRows + place] = v.S(n, g);
    }
  }
  return {{Name("qweight"), "I32", {kColumns / 16, 2 * kRows}, BytesOf(weight)},
          {Name("scales"), "F16", {v.count, kRows}, BytesOf(scales)}};
}

std::vector<TestTensor> CompressedTensors(const Values& v, bool zeros) {
  std::vector<uint32_t> weight(kRows * kColumns / 8), packed(kRows / 8 * v.count);
  for (int n = 0; n < kRows; ++n) {
    for (int k = 0; k < kColumns; ++k) weight[(n * kColumns + k) / 8] |= v.Q(n, k) << 4 * (k % 8);
    for (int g = 0; g < v.count; ++g) packed[n / 8 * v.count + g] |= v.Z(n, g) << 4 * (n % 8);
  }
  std::vector<TestTensor> tensors = {
      {Name("weight_packed"), "I32", {kRows, kColumns / 8}, BytesOf(weight)},
      {Name("weight_scale"), "F32", {kRows, v.count}, BytesOf(v.s)},
      {Name("weight_shape"), "I32", {2}, BytesOf(std::vector<int32_t>{kRows, kColumns})}};
  if (zeros) {
    tensors.push_back({Name("weight_zero_point"), "I32", {kRows / 8, v.count}, BytesOf(packed)});
  }
  return tensors;
}

json CompressedConfig(int group, bool symmetric) {
  json weights = {{"num_bits", 4},
                  {"type", "int"},
                  {"symmetric", symmetric},
                  {"strategy", group < 0 ? "channel" : "group"}};
  if (group > 0) weights["group_size"] = group;
  return {{"quant_method", "compressed-tensors"},
          {"format", "pack-quantized"},
          {"config_groups", {{"group_0", {{"targets", {"Linear"}}, {"weights", weights}}}}}};
}

class LayoutTest : public FolderTest {
 protected:
  absl::StatusOr<LogicalLinear> Load(const json& quantization,
                                     const std::vector<TestTensor>& tensors) const {
    WriteAll(Path("config.json"), Config(quantization).dump());
    WriteAll(Path("model.safetensors"), FileOf(tensors));
    const auto checkpoint = Checkpoint::Open(root_);
    if (!checkpoint.ok()) return checkpoint.status();
    return (*checkpoint)->LoadLinear(kLayer);
  }

  void ExpectValues(const Values& values, const json& quantization,
                    const std::vector<TestTensor>& tensors) const {
    SCOPED_TRACE(quantization.dump());
    const auto linear = Load(quantization, tensors);
    ASSERT_TRUE(linear.ok()) << linear.status();
    EXPECT_EQ(linear->group_size, values.size);
    EXPECT_EQ(linear->q, values.q);
    EXPECT_EQ(linear->zeros, values.z);
    ASSERT_EQ(linear->scales.size(), values.s.size());
    const bool half = linear->stored_type == FloatType::kF16;
    for (size_t i = 0; i < values.s.size(); ++i) {
      ASSERT_EQ(linear->scales[i], half ? HalfToFloat(FloatToHalf(values.s[i])) : values.s[i]);
    }
  }

  // The message and code of a refusal.
  [[nodiscard]] std::string Refusal(const json& quantization,
                                    const std::vector<TestTensor>& tensors) const {
    const auto linear = Load(quantization, tensors);
    EXPECT_FALSE(linear.ok());
    return linear.status().ToString();
  }
};

TEST_F(LayoutTest, EveryGroupSizeOfEveryLayout) {
  for (const int group : {32, 64, 128, -1}) {
    const Values v(group);
    const Values symmetric(group, true);
    ExpectValues(v, Awq("GEMM", group), Gemm(v));
    ExpectValues(v, Awq("gemv", group), Gemv(v));
    ExpectValues(v, Awq("gemv_fast", group), GemvFast(v, "qzeros"));
    ExpectValues(symmetric, Awq("marlin", group), Marlin(symmetric));
    ExpectValues(v, CompressedConfig(group, false), CompressedTensors(v, true));
    ExpectValues(symmetric, CompressedConfig(group, true), CompressedTensors(symmetric, false));
    json llm_awq = Awq("gemm", group);
    llm_awq["backend"] = "llm-awq";
    ExpectValues(v, llm_awq, GemvFast(v, "scaled_zeros"));
    ExpectValues(v, llm_awq, Gemv(v));  // llm-awq v1
  }
}

void ExpectSame(const absl::StatusOr<LogicalLinear>& part, const LogicalLinear& slice) {
  ASSERT_TRUE(part.ok()) << part.status();
  EXPECT_EQ(part->rows, slice.rows);
  EXPECT_EQ(part->columns, slice.columns);
  EXPECT_EQ(part->group_size, slice.group_size);
  EXPECT_EQ(part->q, slice.q);
  EXPECT_EQ(part->zeros, slice.zeros);
  EXPECT_EQ(part->scales, slice.scales);
  EXPECT_EQ(part->bias, slice.bias);
}

TEST_F(LayoutTest, PartsThatAreReadAloneEqualSlicesOfTheWhole) {
  const Values v(64);
  std::vector<float> bias(kRows);
  for (int n = 0; n < kRows; ++n) bias[n] = static_cast<float>(n + 1);
  json config = Config(Awq("gemm", 64));
  config["mlp_bias"] = true;
  WriteAll(Path("config.json"), config.dump());
  for (std::vector<TestTensor> tensors : {Gemm(v), Marlin(Values(64, true))}) {
    if (tensors.size() == 2) {  // marlin has no zeros
      config["quantization_config"] = Awq("marlin", 64);
      WriteAll(Path("config.json"), config.dump());
    }
    tensors.push_back({Name("bias"), "F32", {kRows}, BytesOf(bias)});
    WriteAll(Path("model.safetensors"), FileOf(tensors));
    const auto checkpoint = Checkpoint::Open(root_);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    const auto whole = (*checkpoint)->LoadLinear(kLayer);
    ASSERT_TRUE(whole.ok()) << whole.status();
    // The last of each is no whole word, or cuts groups.
    for (const Range rows :
         {Range{0, 8}, Range{8, 40}, Range{56, 64}, Range{0, 64}, Range{4, 20}}) {
      ExpectSame((*checkpoint)->LoadLinearRows(kLayer, rows),
                 SliceRows(*whole, rows.begin, rows.end));
    }
    for (const Range columns : {Range{0, 64}, Range{64, 192}, Range{0, 256}, Range{32, 96}}) {
      ExpectSame((*checkpoint)->LoadLinearColumns(kLayer, columns),
                 *SliceColumns(*whole, columns.begin, columns.end));
    }
  }
}

TEST_F(LayoutTest, AliasesAndMissingConfigsAreRead) {
  const Values v(128);
  ExpectValues(v, Awq("exllama", 128), Gemm(v));
  ExpectValues(v, Awq("ipex", 128), Gemm(v));
  ExpectValues(v, json(), Gemm(v));
  ExpectValues(v, json(), Gemv(v));  // 128 is what AWQ means where nothing is said
}

TEST_F(LayoutTest, Bf16AndFp32ScalesStayExact) {
  Values v(64);
  std::vector<TestTensor> tensors = Gemm(v);
  std::vector<uint16_t> brain;
  for (int g = 0; g < v.count; ++g) {
    for (int n = 0; n < kRows; ++n) {
      const auto bits = std::bit_cast<uint32_t>(v.s[n * v.count + g]);
      brain.push_back(static_cast<uint16_t>(bits >> 16));
    }
  }
  tensors[2].type = "BF16";
  tensors[2].data = BytesOf(brain);
  const auto linear = Load(Awq("gemm", 64), tensors);
  ASSERT_TRUE(linear.ok()) << linear.status();
  EXPECT_EQ(linear->stored_type, FloatType::kBF16);
  EXPECT_EQ(linear->scales[5 * v.count + 1], BFloatToFloat(brain[kRows + 5]));
}

TEST_F(LayoutTest, NonFiniteScalesAreRefusedAndSubnormalOnesRead) {
  const Values v(64);
  for (const uint16_t bad : std::vector<uint16_t>{0x7c00, 0xfc00, 0x7e01}) {
    std::vector<TestTensor> tensors = Gemm(v);
    std::memcpy(tensors[2].data.data() + 2 * 77, &bad, 2);
    EXPECT_THAT(Refusal(Awq("gemm", 64), tensors),
                AllOf(HasSubstr("DATA_LOSS"), HasSubstr("model.safetensors"),
                      HasSubstr(Name("scales")), HasSubstr("value 77 is not finite")));
  }
  std::vector<TestTensor> tensors = Gemm(v);
  const uint16_t subnormal = 0x8003;
  std::memcpy(tensors[2].data.data(), &subnormal, 2);
  const auto linear = Load(Awq("gemm", 64), tensors);
  ASSERT_TRUE(linear.ok()) << linear.status();
  EXPECT_EQ(linear->scales[0], -3 * 0x1p-24f);
}

TEST_F(LayoutTest, GemvFastZerosOutsideFourBitsAreRefused) {
  const Values v(64);
  std::vector<TestTensor> tensors = GemvFast(v, "qzeros");
  const uint16_t one = FloatToHalf(1), positive = FloatToHalf(2), far = FloatToHalf(-16);
  std::memcpy(tensors[2].data.data() + 2 * 3, &one, 2);
  for (const uint16_t zero : {positive, far}) {
    std::memcpy(tensors[1].data.data() + 2 * 3, &zero, 2);
    EXPECT_THAT(Refusal(Awq("gemv_fast", 64), tensors),
                AllOf(HasSubstr(Name("qzeros")), HasSubstr("value 3"), HasSubstr("0 … 15")));
  }
}

TEST_F(LayoutTest, ForeignFormatsAreRefusedByName) {
  const Values v(64);
  const std::string words(kColumns / 8 * kRows * 4, '\0');
  std::vector<TestTensor> gptq = {
      {Name("qweight"), "I32", {kColumns / 8, kRows}, words},
      {Name("qzeros"), "I32", {v.count, kRows / 8}, std::string(v.count * kRows / 2, '\0')},
      {Name("scales"), "F16", {v.count, kRows}, std::string(v.count * kRows * 2, '\0')}};
  EXPECT_THAT(Refusal(json(), gptq),
              AllOf(HasSubstr("UNIMPLEMENTED"), HasSubstr("GPTQ"), HasSubstr(Name("qweight"))));
  gptq.push_back({Name("g_idx"), "I32", {kColumns}, std::string(4 * kColumns, '\0')});
  EXPECT_THAT(Refusal(json(), gptq),
              AllOf(HasSubstr("UNIMPLEMENTED"), HasSubstr("act-order"), HasSubstr(Name("g_idx"))));
  std::vector<TestTensor> bytes = Gemm(v);
  bytes[0] = {Name("qweight"), "U8", {kColumns, kRows}, std::string(kColumns * kRows, '\0')};
  EXPECT_THAT(Refusal(Awq("gemm", 64), bytes), HasSubstr("8-bit"));
  bytes[0] = {Name("qweight"), "I32", {kColumns, kRows / 4}, std::string(kColumns * kRows, '\0')};
  bytes[1] = {Name("qzeros"), "I32", {v.count, kRows / 4}, std::string(v.count * kRows, '\0')};
  EXPECT_THAT(Refusal(Awq("gemm", 64), bytes), HasSubstr("8-bit"));
}

TEST_F(LayoutTest, TensorsThatDoNotFitTogetherAreNamed) {
  const Values v(64);
  std::vector<TestTensor> tensors = Gemm(v);
  tensors.erase(tensors.begin() + 2);
  EXPECT_THAT(Refusal(Awq("gemm", 64), tensors),
              AllOf(HasSubstr(Name("scales")), HasSubstr("is missing")));

  tensors = Gemm(v);
  tensors.erase(tensors.begin() + 1);  // symmetric gemm files without zeros are not marlin
  EXPECT_THAT(Refusal(Awq("gemm", 64), tensors),
              AllOf(HasSubstr(Name("qzeros")), HasSubstr("is missing")));

  tensors = Gemm(v);
  tensors[2] = {Name("scales"), "F16", {3, kRows}, std::string(3 * kRows * 2, '\0')};
  EXPECT_THAT(Refusal(Awq("gemm", 64), tensors), HasSubstr(Name("qzeros")));

  tensors = Gemm(v);
  tensors[2].type = "I16";
  EXPECT_THAT(Refusal(Awq("gemm", 64), tensors),
              AllOf(HasSubstr(Name("scales")), HasSubstr("type is I16")));

  tensors = Gemm(v);
  tensors[0] = {
      Name("qweight"), "I32", {kColumns / 2, kRows / 4}, std::string(kColumns * kRows / 2, '\0')};
  EXPECT_THAT(Refusal(Awq("gemm", 64), tensors), HasSubstr("is no AWQ layout"));

  tensors = Gemm(v);
  tensors.push_back({Name("weight"), "F16", {1, 1}, "ab"});
  EXPECT_THAT(Refusal(Awq("gemm", 64), tensors), HasSubstr("stored twice"));

  EXPECT_THAT(Refusal(Awq("gemm", 64), {}), AllOf(HasSubstr("NOT_FOUND"), HasSubstr(kLayer)));
}

TEST_F(LayoutTest, OddGroupsAreRefused) {
  const Values v(64);
  std::vector<TestTensor> tensors = Gemm(v);
  for (const int groups : {3, 16}) {  // 256 / 3, and groups of 16
    tensors[1] = {
        Name("qzeros"), "I32", {groups, kRows / 8}, std::string(groups * kRows / 2, '\0')};
    tensors[2] = {Name("scales"), "F16", {groups, kRows}, std::string(groups * kRows * 2, '\0')};
    EXPECT_THAT(Refusal(json(), tensors),
                AllOf(HasSubstr(Name("scales")),
                      HasSubstr(groups == 3 ? "do not divide 256" : "group size is 16")));
  }
}

TEST_F(LayoutTest, ConfigAndTensorsMustAgree) {
  const Values v(64);
  EXPECT_THAT(Refusal(Awq("gemv", 64), Gemm(v)),
              AllOf(HasSubstr("stored as gemm"), HasSubstr("says gemv")));
  EXPECT_THAT(Refusal(Awq("gemm", 128), Gemm(v)),
              AllOf(HasSubstr("groups of 64"), HasSubstr("says 128")));
  EXPECT_THAT(Refusal(Awq("gemm", 32), Gemm(v)),
              AllOf(HasSubstr("groups of 64"), HasSubstr("says 32")));
  EXPECT_THAT(Refusal(CompressedConfig(64, false), Gemm(v)), HasSubstr("compressed-tensors"));
  json listed = Awq("gemm", 64);
  listed["modules_to_not_convert"] = {"down_proj"};
  EXPECT_THAT(Refusal(listed, Gemm(v)), HasSubstr("lists it as not converted"));
  listed["modules_to_not_convert"] = {"up_proj"};
  EXPECT_TRUE(Load(listed, Gemm(v)).ok());
  json ignored = CompressedConfig(64, false);
  ignored["ignore"] = {"re:.*down_proj", "Linear", "lm_head"};  // read from the tensors instead
  EXPECT_TRUE(Load(ignored, CompressedTensors(v, true)).ok());
  ignored["ignore"] = {kLayer};
  EXPECT_THAT(Refusal(ignored, CompressedTensors(v, true)), HasSubstr("lists it"));
}

TEST_F(LayoutTest, ShapesMustBeThoseOfTheConfig) {
  const Values v(64);
  WriteAll(Path("model.safetensors"), FileOf(Gemm(v)));
  json config = Config(Awq("gemm", 64));
  config["intermediate_size"] = kColumns + 64;
  WriteAll(Path("config.json"), config.dump());
  const auto checkpoint = Checkpoint::Open(root_);
  ASSERT_TRUE(checkpoint.ok());
  EXPECT_THAT((*checkpoint)->LoadLinear(kLayer).status().ToString(),
              HasSubstr("holds 64 x 256 weights; config.json says 64 x 320"));
}

TEST(FloatTypesTest, HalvesConvertBothWays) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float value = HalfToFloat(half);
    // The compiler's own conversion is the other opinion.
    _Float16 native;
    std::memcpy(&native, &half, sizeof(native));
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(static_cast<float>(native)));
      continue;
    }
    ASSERT_EQ(value, static_cast<float>(native)) << bits;
    ASSERT_EQ(FloatToHalf(value), half) << bits;
  }
  std::mt19937 random(3);
  for (int i = 0; i < 200'000; ++i) {
    // Exponents around the range of fp16, where rounding, overflow and subnormals lie.
    const auto word = static_cast<uint32_t>(random());
    const uint32_t bits = (word & 0x807fffffu) | (100 + word % 46) << 23;
    const auto value = std::bit_cast<float>(bits);
    const auto native = static_cast<_Float16>(value);
    uint16_t expected = 0;
    std::memcpy(&expected, &native, sizeof(expected));
    ASSERT_EQ(FloatToHalf(value), expected) << value;
  }
}

}  // namespace
}  // namespace nibble::weights
