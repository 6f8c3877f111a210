#include "worker/weights/safetensors_header.h"

#include <algorithm>
#include <array>
#include <compare>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/hash/hash.h"
#include "nlohmann/json.hpp"
#include "worker/model/message.h"
#include "worker/weights/json_events.h"
#include "worker/weights/printable.h"

namespace nibble::weights {
namespace {

using model::Message;
using nlohmann::json;

// Names of types have at most four letters.
uint32_t Letters(std::string_view name) {
  uint32_t letters = 0;
  for (const char letter : name) letters = letters << 8 | static_cast<unsigned char>(letter);
  return letters;
}

std::optional<TensorType> TypeByName(std::string_view name) {
  constexpr auto kTypes = static_cast<size_t>(TensorType::kBool) + 1;
  static const auto kNames = [] {
    std::array<uint32_t, kTypes> names{};
    for (size_t i = 0; i < kTypes; ++i)
      names[i] = Letters(TensorTypeName(static_cast<TensorType>(i)));
    return names;
  }();
  if (name.size() > sizeof(uint32_t)) return std::nullopt;
  const auto found = std::find(kNames.begin(), kNames.end(), Letters(name));
  const auto type = static_cast<TensorType>(found - kNames.begin());
  if (found == kNames.end() || TensorTypeName(type) != name) return std::nullopt;
  return type;
}

// Of entries by number or by name, so that a set of them needs no second copy of each name.
struct NameHash {
  using is_transparent = void;
  const std::vector<HeaderEntry>* entries;
  size_t operator()(std::string_view name) const {
    return absl::HashOf(absl::string_view(name.data(), name.size()));
  }
  size_t operator()(uint32_t entry) const { return (*this)((*entries)[entry].name); }
};
struct NameEqual {
  using is_transparent = void;
  const std::vector<HeaderEntry>* entries;
  bool operator()(uint32_t one, uint32_t other) const { return one == other; }
  bool operator()(uint32_t entry, std::string_view name) const {
    return (*entries)[entry].name == name;
  }
  bool operator()(std::string_view name, uint32_t entry) const { return (*this)(entry, name); }
};

// Only objects of tensors, their three fields and __metadata__'s strings are let through; every
// other shape of document stops the parse at the token that is wrong.
class HeaderReader final : public json::json_sax_t {
 public:
  // Of a text of so many bytes.
  HeaderReader(size_t bytes, SafetensorsHeader* header)
      : header_(*header), names_(0, NameHash{&header->entries}, NameEqual{&header->entries}) {
    constexpr size_t kTensorBytes = 64;  // of the shortest ones that there are
    const size_t tensors = std::min(bytes / kTensorBytes, kTensorsMax);
    names_.reserve(tensors);
    header_.entries.reserve(tensors);
  }

  [[nodiscard]] const absl::Status& status() const { return status_; }

  bool null() override { return Scalar("null"); }
  bool boolean(bool /*value*/) override { return Scalar("a boolean"); }
  bool number_integer(number_integer_t /*value*/) override { return Scalar("a negative number"); }
  bool number_float(number_float_t /*value*/, const string_t& /*text*/) override {
    return Scalar("a fraction");
  }
  bool binary(binary_t& /*value*/) override { return Scalar("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ == Place::kShape) {
      if (value > static_cast<uint64_t>(INT64_MAX)) return Fail("a dimension is beyond 2^63");
      if (entry_.shape.size() == kTensorRankMax) {
        return Fail(Message("more than ", kTensorRankMax, " dimensions"));
      }
      entry_.shape.push_back(static_cast<int64_t>(value));
      return true;
    }
    if (place_ == Place::kOffsets) {
      if (offset_count_ == 2) return Fail("data_offsets has more than two numbers");
      (offset_count_++ == 0 ? entry_.begin : entry_.end) = value;
      return true;
    }
    return Scalar("a number");
  }

  bool string(string_t& value) override {
    if (place_ == Place::kMetadata) {
      header_.metadata[metadata_key_] = value;
      return true;
    }
    if (place_ == Place::kTensor && field_ == Field::kType) return SetType(value);
    return Scalar("a string");
  }

  bool start_object(std::size_t /*count*/) override {
    if (!Enter()) return false;
    switch (place_) {
      case Place::kOutside:
        place_ = Place::kNames;
        return true;
      case Place::kNames:
        place_ = is_metadata_ ? Place::kMetadata : Place::kTensor;
        return true;
      case Place::kTensor:
        return SkipOrFail("an object");
      case Place::kSkipped:
        return true;
      default:
        return Fail("holds an object where it may not");
    }
  }

  bool key(string_t& name) override {
    switch (place_) {
      case Place::kNames:
        return BeginEntry(name);
      case Place::kMetadata:
        metadata_key_ = name;
        if (header_.metadata.contains(name)) {
          return Fail(Message("key ", Printable(name), " appears twice"));
        }
        return true;
      case Place::kTensor:
        return BeginField(name);
      default:
        return true;
    }
  }

  bool end_object() override {
    --depth_;
    if (place_ == Place::kSkipped) return LeaveSkipped();
    if (place_ == Place::kMetadata) place_ = Place::kNames;
    if (place_ == Place::kTensor) {
      place_ = Place::kNames;
      return EndEntry();
    }
    return true;
  }

  bool start_array(std::size_t /*count*/) override {
    if (!Enter()) return false;
    if (place_ == Place::kSkipped) return true;
    if (place_ == Place::kOutside) return Fail("is not a JSON object");
    if (place_ == Place::kTensor && field_ == Field::kShape) {
      place_ = Place::kShape;
      return true;
    }
    if (place_ == Place::kTensor && field_ == Field::kOffsets) {
      place_ = Place::kOffsets;
      return true;
    }
    if (place_ == Place::kTensor) return SkipOrFail("an array");
    return Fail("holds an array where it may not");
  }

  bool end_array() override {
    --depth_;
    if (place_ == Place::kSkipped) return LeaveSkipped();
    if (place_ == Place::kOffsets && offset_count_ != 2) {
      return Fail("data_offsets has fewer than two numbers");
    }
    place_ = Place::kTensor;
    return true;
  }

  // ReadJsonEvents() says in another way where it ended.
  bool parse_error(std::size_t /*position*/, const std::string& /*token*/,
                   const nlohmann::detail::exception& /*error*/) override {
    return false;
  }
  void NotJson(size_t position) {
    entry_.name.clear();
    Fail(Message("is not valid JSON at byte ", position));
  }

 private:
  enum class Place : uint8_t { kOutside, kNames, kMetadata, kTensor, kShape, kOffsets, kSkipped };
  enum class Field : uint8_t { kNone, kType, kShape, kOffsets, kUnknown };

  static uint32_t Bit(Field field) { return 1u << static_cast<uint32_t>(field); }

  bool Fail(std::string_view what, absl::StatusCode code = absl::StatusCode::kDataLoss) {
    const std::string subject =
        entry_.name.empty() ? "header" : Message("tensor ", Printable(entry_.name));
    status_ = absl::Status(code, Message(subject, ": ", what));
    return false;
  }

  bool Enter() {
    if (++depth_ <= kHeaderDepthMax) return true;
    return Fail(Message("nested deeper than ", kHeaderDepthMax, " levels"));
  }

  // A value that fits nowhere but in a field that nobody asked for.
  bool Scalar(std::string_view kind) {
    if (place_ == Place::kSkipped) return true;
    if (place_ == Place::kTensor && field_ == Field::kUnknown) return true;
    return Fail(Message("holds ", kind, " where it may not"));
  }

  bool SkipOrFail(std::string_view kind) {
    if (field_ != Field::kUnknown) return Fail(Message("holds ", kind, " where it may not"));
    place_ = Place::kSkipped;
    skipped_from_ = depth_;
    return true;
  }

  bool LeaveSkipped() {
    if (depth_ < skipped_from_) place_ = Place::kTensor;
    return true;
  }

  bool BeginEntry(const std::string& name) {
    is_metadata_ = std::string_view(name) == "__metadata__";
    entry_ = HeaderEntry();
    entry_.name = name;
    if (is_metadata_ ? has_metadata_ : names_.contains(std::string_view(name))) {
      return Fail("appears twice");
    }
    has_metadata_ |= is_metadata_;
    if (!is_metadata_ && header_.entries.size() == kTensorsMax) {
      entry_.name.clear();
      return Fail(Message("more than ", kTensorsMax, " tensors"));
    }
    fields_seen_ = 0;
    offset_count_ = 0;
    return true;
  }

  bool BeginField(std::string_view name) {
    field_ = name == "dtype"          ? Field::kType
             : name == "shape"        ? Field::kShape
             : name == "data_offsets" ? Field::kOffsets
                                      : Field::kUnknown;
    if (field_ == Field::kUnknown) return true;
    if ((fields_seen_ & Bit(field_)) != 0) {
      return Fail(Message("field ", Printable(name), " appears twice"));
    }
    fields_seen_ |= Bit(field_);
    return true;
  }

  bool SetType(const std::string& name) {
    const auto type = TypeByName(name);
    if (type.has_value()) {
      entry_.type = *type;
      return true;
    }
    if (name.starts_with("F8_") || name.starts_with("F6_") || name == "F4" || name == "C64") {
      return Fail(Message("type ", name, " is not supported"), absl::StatusCode::kUnimplemented);
    }
    return Fail(Message("dtype is ", Printable(name), ", which is no type"));
  }

  bool EndEntry() {
    for (const auto& [field, name] :
         {std::pair(Field::kType, "dtype"), std::pair(Field::kShape, "shape"),
          std::pair(Field::kOffsets, "data_offsets")}) {
      if ((fields_seen_ & Bit(field)) == 0) return Fail(Message(name, " is missing"));
    }
    uint64_t bytes = static_cast<uint64_t>(TensorTypeBytes(entry_.type));
    for (const int64_t dimension : entry_.shape) {
      if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(dimension), &bytes)) {
        return Fail("the shape's product overflows");
      }
    }
    if (entry_.begin > entry_.end) {
      return Fail(Message("data_offsets [", entry_.begin, ", ", entry_.end, "] run backwards"));
    }
    if (entry_.end - entry_.begin != bytes) {
      return Fail(Message("data_offsets span ", entry_.end - entry_.begin,
                          " bytes; type and shape need ", bytes));
    }
    header_.entries.push_back(std::move(entry_));
    names_.insert(static_cast<uint32_t>(header_.entries.size() - 1));
    entry_.name.clear();
    return true;
  }

  SafetensorsHeader& header_;
  absl::Status status_;
  Place place_ = Place::kOutside;
  Field field_ = Field::kNone;
  HeaderEntry entry_;
  absl::flat_hash_set<uint32_t, NameHash, NameEqual> names_;
  uint32_t fields_seen_ = 0;
  std::string metadata_key_;
  bool is_metadata_ = false;
  bool has_metadata_ = false;
  int offset_count_ = 0;
  int depth_ = 0;
  int skipped_from_ = 0;
};

// Writers put tensors in order; where they did not, places are sorted and not the entries, which
// are five times as big.
void SortByPlace(std::vector<HeaderEntry>* entries) {
  struct Place {
    uint64_t begin, end;
    size_t index;
    auto operator<=>(const Place&) const = default;
  };
  std::vector<Place> places;
  places.reserve(entries->size());
  for (const HeaderEntry& entry : *entries) {
    places.push_back({entry.begin, entry.end, places.size()});
  }
  if (std::is_sorted(places.begin(), places.end())) return;
  std::sort(places.begin(), places.end());
  std::vector<HeaderEntry> sorted;
  sorted.reserve(entries->size());
  for (const Place& place : places) sorted.push_back(std::move((*entries)[place.index]));
  *entries = std::move(sorted);
}

}  // namespace

absl::StatusOr<SafetensorsHeader> ParseHeader(std::string_view text) {
  if (!text.starts_with('{')) return absl::DataLossError("header: does not begin with '{'");
  SafetensorsHeader header;
  HeaderReader reader(text.size(), &header);
  const JsonEnd end = ReadJsonEvents(text, &reader);
  if (end.wrong_at.has_value()) reader.NotJson(*end.wrong_at);
  if (!end.whole) return reader.status();
  SortByPlace(&header.entries);
  return header;
}

}  // namespace nibble::weights
