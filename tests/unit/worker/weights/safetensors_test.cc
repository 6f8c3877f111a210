#include "worker/weights/safetensors.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tensor_files.h"
#include "worker/weights/safetensors_writer.h"

namespace nibble::weights {
namespace {

using ::testing::HasSubstr;

using Tensors = std::map<std::string, TensorView, std::less<>>;

absl::StatusOr<Tensors> Parse(const std::string& file) {
  return ParseSafetensors(std::as_bytes(std::span(file)), nullptr);
}

std::string Refusal(const std::string& file) {
  const auto tensors = Parse(file);
  EXPECT_EQ(tensors.status().code(), absl::StatusCode::kDataLoss) << tensors.status();
  return std::string(tensors.status().message());
}

// One tensor "a" with the given fields.
std::string OneTensor(const std::string& fields, const std::string& data = "") {
  return FileOf("{\"a\":{" + fields + "}}", data);
}

TEST(SafetensorsTest, ReadsTensorsInAnyOrderWithMetadata) {
  const std::string header = R"({"b":{"shape":[2,2],"dtype":"I16","data_offsets":[4,12]},)"
                             R"("__metadata__":{"format":"pt"},)"
                             R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  const std::string file = FileOf(header, std::string(12, 'x'));
  std::map<std::string, std::string> metadata;
  const auto tensors = ParseSafetensors(std::as_bytes(std::span(file)), &metadata);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_EQ(tensors->size(), 2u);
  EXPECT_EQ(tensors->at("b").type, TensorType::kI16);
  EXPECT_EQ(tensors->at("b").shape, (std::vector<int64_t>{2, 2}));
  EXPECT_EQ(tensors->at("b").data.size(), 8u);
  EXPECT_EQ(reinterpret_cast<const char*>(tensors->at("a").data.data()),
            file.data() + 8 + header.size());
  EXPECT_EQ(metadata.at("format"), "pt");
}

TEST(SafetensorsTest, LoadsScalarsZeroDimensionsPaddingAndEmptyFiles) {
  const auto scalar = Parse(OneTensor(R"("dtype":"F32","shape":[],"data_offsets":[0,4])", "abcd"));
  ASSERT_TRUE(scalar.ok()) << scalar.status();
  EXPECT_TRUE(scalar->at("a").shape.empty());
  const auto zero = Parse(OneTensor(R"("dtype":"F32","shape":[3,0],"data_offsets":[0,0])"));
  ASSERT_TRUE(zero.ok()) << zero.status();
  EXPECT_TRUE(zero->at("a").data.empty());
  EXPECT_TRUE(Parse(FileOf("{}      ", "")).ok());
  EXPECT_TRUE(Parse(FileOf(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                           R"("b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]},)"
                           R"("c":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}  )",
                           "xy"))
                  .ok());
}

TEST(SafetensorsTest, IgnoresFieldsThatNobodyAskedFor) {
  const char* extra = R"("note":[1,-2,1.5],"dtype":"U8","more":{"x":[]},"shape":[1],"n":null,)"
                      R"("data_offsets":[0,1],"last":"s")";
  EXPECT_TRUE(Parse(OneTensor(extra, "x")).ok());
}

TEST(SafetensorsTest, EveryWayToBeWrongIsNamed) {
  struct Case {
    std::string file;
    const char* said;
  };
  const std::string big = "18446744073709551615";
  const std::vector<Case> cases = {
      {"", "0 bytes"},
      {"1234567", "7 bytes"},
      {FileOf("", ""), "does not begin with '{'"},
      {std::string("\xff\xff\xff\xff\xff\xff\xff\xff", 8) + "{}", "limit is 16777216"},
      {std::string("\x03\0\0\0\0\0\0\0", 8) + "{}", "ends after 2 of them"},
      {FileOf(" {}", ""), "does not begin with '{'"},
      {FileOf("[]", ""), "does not begin with '{'"},
      {FileOf("\xEF\xBB\xBF{}", ""), "does not begin with '{'"},
      {FileOf("{", ""), "not valid JSON"},
      {FileOf("{} x", ""), "not valid JSON"},
      {FileOf(std::string("{}\0x", 4), ""), "not valid JSON"},
      {FileOf("{\"a\xff\":{}}", ""), "not valid JSON"},
      {FileOf(R"({"a":3})", ""), "holds a number"},
      {FileOf(R"({"a":null})", ""), "holds null"},
      {FileOf(R"({"a":[]})", ""), "holds an array"},
      {FileOf(R"({"__metadata__":{"n":3}})", ""), "holds a number"},
      {FileOf(R"({"__metadata__":{"n":"1","n":"2"}})", ""), "appears twice"},
      {FileOf(R"({"__metadata__":{"n":{}}})", ""), "holds an object"},
      {FileOf(R"({"__metadata__":{},"__metadata__":{}})", ""), "appears twice"},
      {OneTensor(R"("dtype":"F33","shape":[1],"data_offsets":[0,4])", "abcd"), "is no type"},
      {OneTensor(R"("dtype":"\u0000U8","shape":[1],"data_offsets":[0,1])", "a"), "is no type"},
      {OneTensor(R"("dtype":3,"shape":[1],"data_offsets":[0,4])", "abcd"), "holds a number"},
      {OneTensor(R"("dtype":"F32","data_offsets":[0,4])", "abcd"), "shape is missing"},
      {OneTensor(R"("shape":[1],"data_offsets":[0,4])", "abcd"), "dtype is missing"},
      {OneTensor(R"("dtype":"F32","shape":[1])", "abcd"), "data_offsets is missing"},
      {OneTensor(R"("dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4])", "abcd"),
       "\"dtype\" appears twice"},
      {OneTensor(R"("dtype":"F32","shape":[-1],"data_offsets":[0,4])", "abcd"), "negative"},
      {OneTensor(R"("dtype":"F32","shape":[1.0],"data_offsets":[0,4])", "abcd"), "fraction"},
      {OneTensor(R"("dtype":"F32","shape":[1e400],"data_offsets":[0,4])", "abcd"), "JSON"},
      {OneTensor(R"("dtype":"F32","shape":[[1]],"data_offsets":[0,4])", "abcd"), "an array"},
      {OneTensor(R"("dtype":"F32","shape":[{}],"data_offsets":[0,4])", "abcd"), "an object"},
      {OneTensor(R"("dtype":"F32","shape":[)" + big + R"(],"data_offsets":[0,4])", "abcd"),
       "beyond 2^63"},
      {OneTensor(R"("dtype":"F32","shape":[4611686018427387904,2],"data_offsets":[0,4])", "abcd"),
       "overflows"},
      {OneTensor(R"("dtype":"U8","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,1])", "a"),
       "more than 8 dimensions"},
      {OneTensor(R"("dtype":"F32","shape":[1],"data_offsets":[4,0])", "abcd"), "run backwards"},
      {OneTensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,8])", "abcdefgh"),
       "span 8 bytes; type and shape need 4"},
      {OneTensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,4,8])", "abcd"), "more than two"},
      {OneTensor(R"("dtype":"F32","shape":[1],"data_offsets":[0])", "abcd"), "fewer than two"},
      {OneTensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,4])", "abc"),
       "the file holds 3 bytes"},
      {OneTensor(R"("dtype":"F32","shape":[1],"data_offsets":[0,4])", "abcde"),
       "the last tensor ends at byte 4"},
      {OneTensor(R"("dtype":"F32","shape":[1],"data_offsets":[1,5])", "abcde"), "a hole"},
      {FileOf(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
              R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
              "abc"),
       "inside the tensor before it"},
      {FileOf(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
              R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
              "ab"),
       "tensor \"a\": appears twice"},
      {OneTensor(R"("x":{"y":{"z":{}}},"dtype":"U8","shape":[0],"data_offsets":[0,0])"),
       "deeper than 4"},
      {FileOf("{\"a\":" + std::string(100'000, '['), ""), "holds an array"},
      {OneTensor("\"x\":" + std::string(100'000, '[')), "deeper than 4"},
  };
  for (const Case& bad : cases) EXPECT_THAT(Refusal(bad.file), HasSubstr(bad.said));
}

TEST(SafetensorsTest, KnownButUnreadTypesAreRefusedByName) {
  const auto tensors =
      Parse(OneTensor(R"("dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1])", "a"));
  EXPECT_EQ(tensors.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(tensors.status().message()), HasSubstr("tensor \"a\": type F8_E4M3"));
}

TEST(SafetensorsTest, NamesAreEscapedAndCutInMessages) {
  const std::string name = "x\\u0000\\n" + std::string(1000, 'y');
  const std::string said = Refusal(FileOf("{\"" + name + "\":3}", ""));
  EXPECT_THAT(said, HasSubstr("\"x\\x00\\nyyy"));
  EXPECT_LT(said.size(), 300u);
}

TEST(SafetensorsTest, OneTensorTooManyIsRefused) {
  const auto header = [](int count) {
    std::string text = "{";
    for (int i = 0; i < count; ++i) {
      text += (i == 0 ? "\"" : ",\"") + std::to_string(i) +
              R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
    }
    return FileOf(text + "}", "");
  };
  EXPECT_TRUE(Parse(header(131'072)).ok());
  EXPECT_THAT(Refusal(header(131'073)), HasSubstr("more than 131072 tensors"));
}

// A header of about 2 KiB in front of 4 KiB of data.
std::string BaseFile() {
  std::vector<TestTensor> tensors;
  for (int i = 0; i < 16; ++i) {
    tensors.push_back({"model.layers." + std::to_string(i) + ".self_attn.q_proj.qweight",
                       "I32",
                       {8, 8},
                       std::string(256, static_cast<char>('a' + i))});
  }
  return FileOf(tensors);
}

TEST(SafetensorsTest, EveryTruncationIsRefused) {
  const std::string file = BaseFile();
  ASSERT_TRUE(Parse(file).ok());
  for (size_t length = 0; length < file.size(); ++length) {
    ASSERT_FALSE(Parse(file.substr(0, length)).ok()) << length;
  }
  EXPECT_FALSE(Parse(file + "x").ok());
}

// What a caller relies on: views inside the file, of the right size, none overlapping.
void ExpectSound(const Tensors& tensors, const std::string& file) {
  std::vector<std::pair<const std::byte*, const std::byte*>> ranges;
  const auto* begin = reinterpret_cast<const std::byte*>(file.data());
  for (const auto& [name, view] : tensors) {
    int64_t bytes = TensorTypeBytes(view.type);
    for (const int64_t dimension : view.shape) bytes *= dimension;
    ASSERT_EQ(bytes, static_cast<int64_t>(view.data.size()));
    ASSERT_GE(view.data.data(), begin);
    ASSERT_LE(view.data.data() + view.data.size(), begin + file.size());
    ranges.emplace_back(view.data.data(), view.data.data() + view.data.size());
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) ASSERT_LE(ranges[i - 1].second, ranges[i].first);
}

TEST(SafetensorsTest, EveryFlippedHeaderBitIsRefusedOrHarmless) {
  const std::string base = BaseFile();
  uint64_t header = 0;
  std::memcpy(&header, base.data(), sizeof(header));
  int accepted = 0;
  for (size_t bit = 0; bit < (sizeof(header) + header) * 8; ++bit) {
    std::string file = base;
    file[bit / 8] = static_cast<char>(file[bit / 8] ^ (1 << bit % 8));
    const auto tensors = Parse(file);
    if (!tensors.ok()) continue;
    ++accepted;
    ExpectSound(*tensors, file);
  }
  EXPECT_GT(accepted, 0);  // names are free
}

class SafetensorsFileTest : public FolderTest {};

TEST_F(SafetensorsFileTest, WriterAndReaderAgree) {
  const std::vector<TensorPlan> plan = {{"b", TensorType::kI16, {3}},
                                        {"none", TensorType::kF32, {0, 5}},
                                        {"a", TensorType::kF32, {2, 1}}};
  auto writer = SafetensorsWriter::Create(Path("f"), plan, {{"format", "pt"}});
  ASSERT_TRUE(writer.ok()) << writer.status();
  const std::vector<float> a = {1.5f, -2};
  const std::vector<int16_t> b = {1, 2, 3};
  ASSERT_TRUE((*writer)->Write("a", std::as_bytes(std::span(a))).ok());
  ASSERT_TRUE((*writer)->Write("b", std::as_bytes(std::span(b))).ok());
  ASSERT_TRUE((*writer)->Finish().ok());
  EXPECT_FALSE(SafetensorsWriter::Create(Path("f"), plan, {}).ok());
  const auto file = SafetensorsFile::Open(Path("f"));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ((*file)->metadata().at("format"), "pt");
  const TensorView& read = (*file)->tensors().at("a");
  EXPECT_EQ(read.shape, (std::vector<int64_t>{2, 1}));
  EXPECT_TRUE(std::ranges::equal(read.data, std::as_bytes(std::span(a))));
  EXPECT_EQ((*file)->tensors().size(), 3u);
  EXPECT_EQ(reinterpret_cast<uintptr_t>((*file)->tensors().at("b").data.data()) % 64, 0u);
}

TEST_F(SafetensorsFileTest, OpenNamesTheFile) {
  EXPECT_EQ(SafetensorsFile::Open(Path("absent")).status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(SafetensorsFile::Open(root_).ok());
  WriteAll(Path("empty"), "");
  const auto file = SafetensorsFile::Open(Path("empty"));
  EXPECT_THAT(std::string(file.status().message()), HasSubstr(Path("empty") + ": the file has 0"));
}

}  // namespace
}  // namespace nibble::weights
