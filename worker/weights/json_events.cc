#include "worker/weights/json_events.h"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

namespace nibble::weights {
namespace {

constexpr size_t kUnknownSize = static_cast<size_t>(-1);

bool IsBlank(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }

// What a string's bytes may not be as they are: its end, an escape, a control character; and what
// must be looked at as UTF-8.
constexpr std::array<bool, 256> MakeSpecial() {
  std::array<bool, 256> special{};
  for (size_t i = 0; i < 256; ++i) special[i] = i < 0x20 || i >= 0x80 || i == '"' || i == '\\';
  return special;
}
constexpr std::array<bool, 256> kSpecial = MakeSpecial();

void AppendUtf8(uint32_t code, std::string* out) {
  const auto tail = [code, out](int shift) {
    *out += static_cast<char>(0x80 | (code >> shift & 0x3f));
  };
  if (code < 0x80) {
    *out += static_cast<char>(code);
  } else if (code < 0x800) {
    *out += static_cast<char>(0xc0 | code >> 6);
    tail(0);
  } else if (code < 0x10000) {
    *out += static_cast<char>(0xe0 | code >> 12);
    tail(6);
    tail(0);
  } else {
    *out += static_cast<char>(0xf0 | code >> 18);
    tail(12);
    tail(6);
    tail(0);
  }
}

// Bytes of the character that `text` begins with, of two to four; 0 where it is none.
size_t Utf8Length(std::string_view text) {
  const auto at = [text](size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U;
  };
  const unsigned first = at(0);
  const size_t length = first < 0xc2   ? 0
                        : first < 0xe0 ? 2
                        : first < 0xf0 ? 3
                        : first < 0xf5 ? 4
                                       : 0;
  for (size_t i = 1; i < length; ++i) {
    if ((at(i) & 0xc0) != 0x80) return 0;
  }
  const bool overlong = (first == 0xe0 && at(1) < 0xa0) || (first == 0xf0 && at(1) < 0x90);
  const bool no_character = (first == 0xed && at(1) > 0x9f) || (first == 0xf4 && at(1) > 0x8f);
  return overlong || no_character ? 0 : length;
}

class Reader {
 public:
  Reader(std::string_view text, nlohmann::json_sax<nlohmann::json>* events)
      : text_(text), events_(*events) {}

  JsonEnd Read();

 private:
  enum class State : uint8_t { kValue, kFirstValue, kKey, kFirstKey, kAfter };

  [[nodiscard]] char Peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void SkipBlanks() {
    while (at_ < text_.size() && IsBlank(text_[at_])) ++at_;
  }
  void SkipDigits() {
    while (at_ < text_.size() && IsDigit(text_[at_])) ++at_;
  }
  // False, and how it ends, where reading cannot go on.
  bool Wrong() {
    end_.wrong_at = at_;
    return false;
  }
  bool Step();
  bool Key();
  bool Value();
  bool Open(bool object);
  bool Close(char c);
  bool Word(std::string_view word);
  bool PlainText();
  bool String();
  bool Escape();
  bool HexCode(uint32_t* code);
  bool Number();
  bool Digits();
  bool Real(std::string_view token);

  std::string_view text_;
  nlohmann::json_sax<nlohmann::json>& events_;
  size_t at_ = 0;
  State state_ = State::kValue;
  std::vector<bool> objects_;  // of each open container, whether it is one
  std::string string_;
  JsonEnd end_;
};

JsonEnd Reader::Read() {
  do {
    SkipBlanks();
    if (at_ == text_.size() && state_ == State::kAfter && objects_.empty()) {
      end_.whole = true;
      break;
    }
  } while (Step());
  return end_;
}

bool Reader::Step() {
  const char c = Peek();
  switch (state_) {
    case State::kFirstKey:
      if (c == '}') return Close(c);
      return Key();
    case State::kKey:
      return Key();
    case State::kFirstValue:
      if (c == ']') return Close(c);
      return Value();
    case State::kValue:
      return Value();
    case State::kAfter:
      break;
  }
  if (objects_.empty()) return Wrong();
  if (c == ',') {
    state_ = objects_.back() ? State::kKey : State::kValue;
    ++at_;
    return true;
  }
  return c == (objects_.back() ? '}' : ']') ? Close(c) : Wrong();
}

bool Reader::Key() {
  if (Peek() != '"') return Wrong();
  if (!String() || !events_.key(string_)) return false;
  SkipBlanks();
  if (Peek() != ':') return Wrong();
  ++at_;
  state_ = State::kValue;
  return true;
}

bool Reader::Value() {
  const char c = Peek();
  if (c == '{' || c == '[') return Open(c == '{');
  state_ = State::kAfter;
  if (c == '"') return String() && events_.string(string_);
  if (c == '-' || IsDigit(c)) return Number();
  if (c == 't') return Word("true") && events_.boolean(true);
  if (c == 'f') return Word("false") && events_.boolean(false);
  if (c == 'n') return Word("null") && events_.null();
  return Wrong();
}

bool Reader::Open(bool object) {
  if (!(object ? events_.start_object(kUnknownSize) : events_.start_array(kUnknownSize))) {
    return false;
  }
  objects_.push_back(object);
  state_ = object ? State::kFirstKey : State::kFirstValue;
  ++at_;
  return true;
}

bool Reader::Close(char c) {
  if (!(c == '}' ? events_.end_object() : events_.end_array())) return false;
  objects_.pop_back();
  state_ = State::kAfter;
  ++at_;
  return true;
}

bool Reader::Word(std::string_view word) {
  if (text_.substr(at_, word.size()) != word) return Wrong();
  at_ += word.size();
  return true;
}

// What needs no change: up to a quote, an escape or what may not be there.
bool Reader::PlainText() {
  for (;;) {
    while (at_ < text_.size() && !kSpecial[static_cast<unsigned char>(text_[at_])]) ++at_;
    if (static_cast<unsigned char>(Peek()) < 0x80) return true;
    const size_t length = Utf8Length(text_.substr(at_));
    if (length == 0) return Wrong();
    at_ += length;
  }
}

// From its first quote to behind its last, into string_.
bool Reader::String() {
  string_.clear();
  ++at_;
  for (;;) {
    const size_t begin = at_;
    if (!PlainText()) return false;
    string_.append(text_, begin, at_ - begin);
    if (Peek() == '"') break;
    if (Peek() != '\\' || !Escape()) return Wrong();
  }
  ++at_;
  return true;
}

bool Reader::HexCode(uint32_t* code) {
  constexpr size_t kHexDigits = 4;
  *code = 0;
  for (size_t i = 0; i < kHexDigits; ++i, ++at_) {
    const char c = Peek();
    const char letter = static_cast<char>(c | 0x20);
    if (!IsDigit(c) && (letter < 'a' || letter > 'f')) return false;
    *code = *code << 4 | static_cast<uint32_t>(IsDigit(c) ? c - '0' : letter - 'a' + 10);
  }
  return true;
}

bool Reader::Escape() {
  constexpr std::string_view kLetters = "\"\\/bfnrt";
  constexpr std::string_view kMeant = "\"\\/\b\f\n\r\t";
  ++at_;
  const char letter = Peek();
  if (const size_t which = kLetters.find(letter); which != kLetters.npos) {
    string_ += kMeant[which];
    ++at_;
    return true;
  }
  uint32_t code = 0;
  if (letter != 'u') return false;
  ++at_;
  if (!HexCode(&code) || (code >= 0xdc00 && code < 0xe000)) return false;
  if (code >= 0xd800 && code < 0xdc00) {
    uint32_t low = 0;
    if (text_.substr(at_, 2) != "\\u") return false;
    at_ += 2;
    if (!HexCode(&low) || low < 0xdc00 || low >= 0xe000) return false;
    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
  }
  AppendUtf8(code, &string_);
  return true;
}

// At least one.
bool Reader::Digits() {
  if (!IsDigit(Peek())) return false;
  SkipDigits();
  return true;
}

bool Reader::Number() {
  const size_t begin = at_;
  const bool negative = Peek() == '-';
  if (negative) ++at_;
  if (Peek() == '0') {
    ++at_;
  } else if (!Digits()) {
    return Wrong();
  }
  bool whole = true;
  if (Peek() == '.') {
    whole = false;
    ++at_;
    if (!Digits()) return Wrong();
  }
  if (Peek() == 'e' || Peek() == 'E') {
    whole = false;
    ++at_;
    if (Peek() == '+' || Peek() == '-') ++at_;
    if (!Digits()) return Wrong();
  }
  const std::string_view token = text_.substr(begin, at_ - begin);
  const char* const end = token.data() + token.size();
  uint64_t natural = 0;
  if (whole && !negative && std::from_chars(token.data(), end, natural).ec == std::errc()) {
    return events_.number_unsigned(natural);
  }
  int64_t integer = 0;
  if (whole && negative && std::from_chars(token.data(), end, integer).ec == std::errc()) {
    return events_.number_integer(integer);
  }
  return Real(token);
}

bool Reader::Real(std::string_view token) {
  const std::string text(token);
  const double value = std::strtod(text.c_str(), nullptr);
  return std::isfinite(value) ? events_.number_float(value, text) : Wrong();
}

}  // namespace

JsonEnd ReadJsonEvents(std::string_view text, nlohmann::json_sax<nlohmann::json>* events) {
  return Reader(text, events).Read();
}

}  // namespace nibble::weights
