#include "base/grpc_status.h"

#include <algorithm>
#include <cstdint>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace nibble {
namespace {

constexpr char kTypePrefix[] = "type.googleapis.com/";
constexpr size_t kMessageBytesMax = 768;
constexpr size_t kDetailsBytesMax = 3584;  // base64 makes a third more of it on the wire

template <typename Message>
std::string TypeUrl() {
  return absl::StrCat(kTypePrefix, Message::descriptor()->full_name());
}

template <typename Message>
void SetDetail(absl::Status* status, const Message& message) {
  CHECK(!status->ok());
  status->SetPayload(TypeUrl<Message>(), absl::Cord(message.SerializeAsString()));
}

template <typename Message>
std::optional<Message> GetDetail(const absl::Status& status) {
  const auto payload = status.GetPayload(TypeUrl<Message>());
  Message message;
  if (!payload.has_value() || !message.ParseFromString(std::string(*payload))) return std::nullopt;
  return message;
}

// The longest prefix of at most `limit` bytes that does not end inside a character.
std::string_view CutUtf8(std::string_view text, size_t limit) {
  if (text.size() <= limit) return text;
  size_t end = limit;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end);
}

// Payloads come in no promised order; clients and tests get one that is.
std::vector<std::pair<std::string, std::string>> SortedPayloads(const absl::Status& status) {
  std::vector<std::pair<std::string, std::string>> payloads;
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& bytes) {
    payloads.emplace_back(std::string(url), std::string(bytes));
  });
  std::sort(payloads.begin(), payloads.end());
  const std::string first = TypeUrl<google::rpc::ErrorInfo>();
  std::stable_partition(payloads.begin(), payloads.end(),
                        [&](const auto& payload) { return payload.first == first; });
  return payloads;
}

}  // namespace

void SetErrorInfo(absl::Status* status, std::string_view reason, const ErrorMetadata& metadata) {
  google::rpc::ErrorInfo info;
  info.set_domain(std::string(kErrorDomain));
  info.set_reason(std::string(reason));
  for (const auto& [key, value] : metadata) (*info.mutable_metadata())[key] = value;
  SetDetail(status, info);
}

std::string ErrorReason(const absl::Status& status) {
  const auto info = GetDetail<google::rpc::ErrorInfo>(status);
  return info.has_value() && info->domain() == kErrorDomain ? info->reason() : std::string();
}

ErrorMetadata ErrorInfoMetadata(const absl::Status& status) {
  ErrorMetadata metadata;
  if (const auto info = GetDetail<google::rpc::ErrorInfo>(status)) {
    for (const auto& [key, value] : info->metadata()) metadata.emplace_back(key, value);
  }
  std::sort(metadata.begin(), metadata.end());
  return metadata;
}

void SetRetryInfo(absl::Status* status, Duration delay) {
  google::rpc::RetryInfo info;
  constexpr int64_t kNanosPerSecond = 1'000'000'000;
  info.mutable_retry_delay()->set_seconds(delay.count() / kNanosPerSecond);
  info.mutable_retry_delay()->set_nanos(static_cast<int32_t>(delay.count() % kNanosPerSecond));
  SetDetail(status, info);
}

std::optional<Duration> RetryDelay(const absl::Status& status) {
  const auto info = GetDetail<google::rpc::RetryInfo>(status);
  if (!info.has_value()) return std::nullopt;
  constexpr int64_t kSecondsMax = 24 * 3600;  // what a peer may ask for
  const int64_t seconds = std::clamp<int64_t>(info->retry_delay().seconds(), 0, kSecondsMax);
  return std::chrono::seconds(seconds) + std::chrono::nanoseconds(info->retry_delay().nanos());
}

void SetResourceInfo(absl::Status* status, std::string_view type, std::string_view name,
                     std::string_view description) {
  google::rpc::ResourceInfo info;
  info.set_resource_type(std::string(type));
  info.set_resource_name(std::string(name));
  info.set_description(std::string(description));
  SetDetail(status, info);
}

absl::Status InvalidFieldsError(std::span<const FieldViolation> violations,
                                std::string_view reason) {
  CHECK(!violations.empty());
  std::string message;
  google::rpc::BadRequest bad_request;
  size_t bytes = 0;
  for (const FieldViolation& violation : violations) {
    absl::StrAppend(&message, message.empty() ? "" : "; ", violation.field, ": ",
                    violation.description);
    auto* entry = bad_request.add_field_violations();
    entry->set_field(violation.field);
    // Past two thirds of the room only names go in: every bad field is named, whatever it costs.
    bytes += violation.field.size() + violation.description.size() + 8;
    if (bytes < kDetailsBytesMax * 2 / 3) entry->set_description(violation.description);
  }
  absl::Status status = absl::InvalidArgumentError(message);
  SetErrorInfo(&status, reason);
  SetDetail(&status, bad_request);
  return status;
}

std::vector<FieldViolation> FieldViolations(const absl::Status& status) {
  std::vector<FieldViolation> violations;
  if (const auto bad_request = GetDetail<google::rpc::BadRequest>(status)) {
    for (const auto& entry : bad_request->field_violations()) {
      violations.push_back({entry.field(), entry.description()});
    }
  }
  return violations;
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const std::string message(CutUtf8(
      std::string_view(status.message().data(), status.message().size()), kMessageBytesMax));
  google::rpc::Status details;
  details.set_code(static_cast<int32_t>(status.code()));
  details.set_message(message);  // Python's grpc_status refuses details whose message differs
  size_t bytes = 0;
  for (const auto& [url, payload] : SortedPayloads(status)) {
    bytes += url.size() + payload.size();
    if (bytes > kDetailsBytesMax) break;
    auto* any = details.add_details();
    any->set_type_url(url);
    any->set_value(payload);
  }
  const auto code = static_cast<grpc::StatusCode>(status.code());
  if (details.details_size() == 0) return {code, message};
  return {code, message, details.SerializeAsString()};
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  const int code = status.error_code();
  const bool canonical = code > 0 && code <= static_cast<int>(grpc::StatusCode::UNAUTHENTICATED);
  absl::Status result(canonical ? static_cast<absl::StatusCode>(code) : absl::StatusCode::kUnknown,
                      status.error_message());
  google::rpc::Status details;
  if (!status.error_details().empty() && details.ParseFromString(status.error_details())) {
    for (const auto& any : details.details()) {
      result.SetPayload(any.type_url(), absl::Cord(any.value()));
    }
  }
  return result;
}

}  // namespace nibble
