#include "services/gateway/message_codec.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/unknown_field_set.h>
#include <grpcpp/support/proto_buffer_reader.h>
#include <grpcpp/support/slice.h>

#include <string>
#include <string_view>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/grpc_status.h"

namespace nibble::gateway {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::UnknownField;
using google::protobuf::UnknownFieldSet;

constexpr size_t kNamedMax = 8;  // bad fields, beyond which one more says as much
constexpr int kDepthMax = 16;

// Well-formed UTF-8: no overlong forms, no surrogates, nothing above U+10FFFF.
bool IsUtf8(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const auto byte = static_cast<unsigned char>(text[i]);
    if (byte < 0x80) {
      ++i;
      continue;
    }
    const size_t tail = byte >= 0xF0 ? 3 : byte >= 0xE0 ? 2 : 1;
    if (byte < 0xC2 || byte > 0xF4 || i + tail >= text.size()) return false;
    for (size_t k = 1; k <= tail; ++k) {
      if ((static_cast<unsigned char>(text[i + k]) & 0xC0) != 0x80) return false;
    }
    const auto second = static_cast<unsigned char>(text[i + 1]);
    if ((byte == 0xE0 && second < 0xA0) || (byte == 0xED && second > 0x9F) ||
        (byte == 0xF0 && second < 0x90) || (byte == 0xF4 && second > 0x8F)) {
      return false;
    }
    i += tail + 1;
  }
  return true;
}

void FindBadStrings(const Descriptor& type, const std::string& bytes, const std::string& path,
                    int depth, std::vector<FieldViolation>* violations) {
  UnknownFieldSet fields;
  if (depth > kDepthMax || !fields.ParseFromString(bytes)) return;
  std::vector<int> seen(static_cast<size_t>(type.field_count()), 0);  // of repeated fields
  for (int i = 0; i < fields.field_count() && violations->size() < kNamedMax; ++i) {
    const UnknownField& value = fields.field(i);
    const FieldDescriptor* field = type.FindFieldByNumber(value.number());
    if (field == nullptr || value.type() != UnknownField::TYPE_LENGTH_DELIMITED) continue;
    std::string name = absl::StrCat(path, field->name());
    if (field->is_repeated()) {
      absl::StrAppend(&name, "[", seen[static_cast<size_t>(field->index())]++, "]");
    }
    if (field->type() == FieldDescriptor::TYPE_STRING && !IsUtf8(value.length_delimited())) {
      violations->push_back({name, "is not valid UTF-8"});
    } else if (field->type() == FieldDescriptor::TYPE_MESSAGE) {
      FindBadStrings(*field->message_type(), value.length_delimited(), name + ".", depth + 1,
                     violations);
    }
  }
}

std::string Flatten(const grpc::ByteBuffer& bytes) {
  std::vector<grpc::Slice> slices;
  std::string flat;
  if (!bytes.Dump(&slices).ok()) return flat;
  for (const grpc::Slice& slice : slices) {
    flat.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return flat;
}

}  // namespace

absl::Status ParseMessage(const grpc::ByteBuffer& bytes, google::protobuf::Message* message) {
  grpc::ByteBuffer copy = bytes;  // shares the slices; the reader wants to own them
  grpc::ProtoBufferReader reader(&copy);
  if (reader.status().ok() && message->ParseFromZeroCopyStream(&reader)) return absl::OkStatus();
  message->Clear();
  std::vector<FieldViolation> violations;
  FindBadStrings(*message->GetDescriptor(), Flatten(bytes), "", 0, &violations);
  if (violations.empty()) {
    violations.push_back(
        {"request", absl::StrCat("is not a well-formed ", message->GetDescriptor()->full_name())});
  }
  return InvalidFieldsError(violations);
}

grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message) {
  const size_t size = message.ByteSizeLong();
  grpc::Slice slice(size);
  auto* begin = const_cast<uint8_t*>(slice.begin());  // ours alone until it is handed on
  CHECK(message.SerializeWithCachedSizesToArray(begin) == begin + size);
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace nibble::gateway
