#include "worker/weights/safetensors_header.h"

#include <algorithm>
#include <optional>
#include <unordered_set>
#include <utility>

#include "nlohmann/json.hpp"
#include "worker/model/message.h"
#include "worker/weights/printable.h"

namespace nibble::weights {
namespace {

using model::Message;
using nlohmann::json;

std::optional<TensorType> TypeByName(std::string_view name) {
  for (int i = 0; i <= static_cast<int>(TensorType::kBool); ++i) {
    const auto type = static_cast<TensorType>(i);
    if (TensorTypeName(type) == name) return type;
  }
  return std::nullopt;
}

// Only objects of tensors, their three fields and __metadata__'s strings are let through; every
// other shape of document stops the parse at the token that is wrong.
class HeaderReader final : public json::json_sax_t {
 public:
  explicit HeaderReader(SafetensorsHeader* header) : header_(*header) {}

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

  bool parse_error(std::size_t position, const std::string& /*token*/,
                   const nlohmann::detail::exception& /*error*/) override {
    if (status_.ok()) {
      entry_.name.clear();
      Fail(Message("is not valid JSON at byte ", position));
    }
    return false;
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
    is_metadata_ = name == "__metadata__";
    entry_ = HeaderEntry();
    entry_.name = name;
    if (!names_.insert(name).second) return Fail("appears twice");
    if (!is_metadata_ && header_.entries.size() == kTensorsMax) {
      entry_.name.clear();
      return Fail(Message("more than ", kTensorsMax, " tensors"));
    }
    fields_seen_ = 0;
    offset_count_ = 0;
    return true;
  }

  bool BeginField(const std::string& name) {
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
    entry_.name.clear();
    return true;
  }

  SafetensorsHeader& header_;
  absl::Status status_;
  Place place_ = Place::kOutside;
  Field field_ = Field::kNone;
  HeaderEntry entry_;
  std::unordered_set<std::string> names_;
  uint32_t fields_seen_ = 0;
  std::string metadata_key_;
  bool is_metadata_ = false;
  int offset_count_ = 0;
  int depth_ = 0;
  int skipped_from_ = 0;
};

}  // namespace

absl::StatusOr<SafetensorsHeader> ParseHeader(std::string_view text) {
  if (!text.starts_with('{')) return absl::DataLossError("header: does not begin with '{'");
  SafetensorsHeader header;
  HeaderReader reader(&header);
  if (!json::sax_parse(text, &reader)) return reader.status();
  std::sort(header.entries.begin(), header.entries.end(),
            [](const HeaderEntry& a, const HeaderEntry& b) {
              return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
            });
  return header;
}

}  // namespace nibble::weights
