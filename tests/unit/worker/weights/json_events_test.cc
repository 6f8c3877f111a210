// The same events as nlohmann's own reader gives, for the same text.
#include "worker/weights/json_events.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/support/test_data.h"

namespace nibble::weights {
namespace {

using nlohmann::json;

// Writes down what it is told, and after `wanted` events wants no more.
class Recorder final : public json::json_sax_t {
 public:
  explicit Recorder(size_t wanted) : wanted_(wanted) {}

  [[nodiscard]] const std::vector<std::string>& events() const { return events_; }

  bool null() override { return Note("null"); }
  bool boolean(bool value) override { return Note(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override { return Note(absl::StrCat("i", value)); }
  bool number_unsigned(number_unsigned_t value) override { return Note(absl::StrCat("u", value)); }
  bool number_float(number_float_t value, const string_t& text) override {
    return Note(absl::StrCat("f", text, "=", json(value).dump()));
  }
  bool string(string_t& value) override { return Note("s" + value); }
  bool binary(binary_t& /*value*/) override { return Note("binary"); }
  bool start_object(std::size_t size) override { return Note(absl::StrCat("{", size)); }
  bool key(string_t& name) override { return Note("k" + name); }
  bool end_object() override { return Note("}"); }
  bool start_array(std::size_t size) override { return Note(absl::StrCat("[", size)); }
  bool end_array() override { return Note("]"); }
  bool parse_error(std::size_t /*position*/, const std::string& /*token*/,
                   const nlohmann::detail::exception& /*error*/) override {
    return false;
  }

 private:
  bool Note(std::string event) {
    events_.push_back(std::move(event));
    return events_.size() < wanted_;
  }

  const size_t wanted_;
  std::vector<std::string> events_;
};

void ExpectSame(const std::string& text, size_t wanted = SIZE_MAX) {
  Recorder own(wanted);
  Recorder theirs(wanted);
  const JsonEnd end = ReadJsonEvents(text, &own);
  const bool whole = json::sax_parse(text, &theirs);
  EXPECT_EQ(end.whole, whole) << text;
  EXPECT_EQ(own.events(), theirs.events()) << text;
  EXPECT_EQ(end.wrong_at.has_value(), !whole && theirs.events().size() < wanted) << text;
}

const char* const kTexts[] = {"",
                              " ",
                              "{}",
                              "[]",
                              " [ ] ",
                              "{ }",
                              "null",
                              "true",
                              "false",
                              "nul",
                              "tru",
                              "nulll",
                              "[nullx]",
                              "0",
                              "-0",
                              "00",
                              "01",
                              "-",
                              "-a",
                              "1.",
                              ".5",
                              "1.5",
                              "-1.5e3",
                              "1e",
                              "1e+",
                              "1E-2",
                              "1e400",
                              "-1e400",
                              "1e-400",
                              "18446744073709551615",
                              "18446744073709551616",
                              "-9223372036854775808",
                              "-9223372036854775809",
                              "123456789012345678901234567890",
                              "+1",
                              "1 2",
                              "[1,2,3]",
                              "[1,]",
                              "[,1]",
                              "[1 2]",
                              "[1}",
                              "{\"a\":1}",
                              "{\"a\":1,}",
                              "{\"a\"}",
                              "{\"a\" 1}",
                              "{\"a\":}",
                              "{a:1}",
                              "{1:1}",
                              "{\"a\":1]",
                              "{\"a\":{\"b\":[{},[],\"c\"]},\"a\":null}",
                              "[[[[[[[[]]]]]]]]",
                              "[[",
                              "]",
                              "}",
                              ",",
                              ":",
                              "\"",
                              "\"a",
                              "\"a\"b",
                              R"("\"\\\/\b\f\n\r\t")",
                              R"("\x")",
                              R"("\)",
                              R"("\u0041\u00e9\u20ac")",
                              R"("\ud83d\ude00")",
                              R"("\ud83d")",
                              R"("\ud83dx")",
                              R"("\ud83d\u0041")",
                              R"("\ude00")",
                              R"("\u12")",
                              R"("\u12g4")",
                              R"("\u+123")",
                              R"("\u0000")",
                              "\"\x01\"",
                              "\"\x7f\"",
                              "\"\n\"",
                              "\"\xc3\xa9\"",
                              "\"\xc3\"",
                              "\"\xc3(\"",
                              "\"\xc0\xaf\"",
                              "\"\xe2\x82\xac\"",
                              "\"\xe2\x82\"",
                              "\"\xe0\x9f\xbf\"",
                              "\"\xe0\xa0\x80\"",
                              "\"\xed\x9f\xbf\"",
                              "\"\xed\xa0\x80\"",
                              "\"\xf0\x9f\x98\x80\"",
                              "\"\xf0\x8f\xbf\xbf\"",
                              "\"\xf4\x8f\xbf\xbf\"",
                              "\"\xf4\x90\x80\x80\"",
                              "\"\xf5\x80\x80\x80\"",
                              "\"\x80\"",
                              "\"\xff\"",
                              "\xc3\xa9",
                              "[1]\x0b",
                              "\t\r\n [\t1\r,\n2 ]\t\r\n"};

TEST(JsonEventsTest, AreThoseOfTheLibrarysReader) {
  for (const char* text : kTexts) ExpectSame(text);
  ExpectSame(std::string("\"a\0b\"", 5));
  ExpectSame(std::string(R"("\)") + '\0' + '"');
}

// The library takes a zero byte for the end of the text, whatever follows.
TEST(JsonEventsTest, ZeroBytesEndNothing) {
  Recorder recorder(SIZE_MAX);
  const JsonEnd end = ReadJsonEvents(std::string("1\0", 2), &recorder);
  EXPECT_FALSE(end.whole);
  EXPECT_EQ(end.wrong_at, 1U);
}

TEST(JsonEventsTest, StopWhereTheyAreNotWanted) {
  const std::string text = R"({"a":[1,-2,3.5,"x",null,true,{}],"b":false})";
  for (size_t wanted = 1; wanted < 20; ++wanted) ExpectSame(text, wanted);
}

// Real headers and the fuzzer's, with bytes changed, taken out and put in.
TEST(JsonEventsTest, AreTheSameForDamagedTexts) {
  std::vector<std::string> texts(std::begin(kTexts), std::end(kTexts));
  texts.push_back(R"({"__metadata__":{"format":"pt\u00e9"},"model.a":{"dtype":"F16","shape":[2,3],)"
                  R"("data_offsets":[0,12]},"é":{"x":-1.5e-3,"y":[true,null],"data_offsets":[]}})");
  const std::string corpus = nibble::testing::SourceDir() + "/tests/fuzz/corpus/config";
  for (const auto& entry : std::filesystem::directory_iterator(corpus)) {
    std::ifstream file(entry.path(), std::ios::binary);
    texts.emplace_back((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  }
  EXPECT_GT(texts.size(), std::size(kTexts) + 1);
  constexpr std::string_view kBytes = "{}[]:,\"\\u0123456789abcdefDE+-. \n\x01\x80\xc3\xa9\xe2\xf0";
  std::mt19937 random(4);
  const auto below = [&random](size_t bound) { return random() % bound; };
  for (int i = 0; i < 20'000; ++i) {
    std::string text = texts[below(texts.size())].substr(0, 2000);
    for (size_t change = below(4); change > 0 && !text.empty(); --change) {
      const size_t at = below(text.size());
      const char byte = kBytes[below(kBytes.size())];
      switch (below(3)) {
        case 0:
          text[at] = byte;
          break;
        case 1:
          text.erase(at, 1 + below(3));
          break;
        default:
          text.insert(at, 1, byte);
      }
    }
    if (text.starts_with("\xef")) continue;  // a byte-order mark, which the library skips
    ExpectSame(text);
    if (::testing::Test::HasFailure()) return;
  }
}

}  // namespace
}  // namespace nibble::weights
