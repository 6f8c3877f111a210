#include "services/gateway/generation_rpcs.h"

#include <utility>

#include "services/gateway/message_codec.h"

namespace nibble::gateway {
namespace {

namespace pb = inference::v1;

const pb::GenerateRequest& Inner(const pb::GenerateRequest& request) { return request; }
const pb::ChatRequest& Inner(const pb::ChatRequest& request) { return request; }
const pb::GenerateRequest& Inner(const pb::GenerateStreamRequest& request) {
  return request.request();
}
const pb::ChatRequest& Inner(const pb::ChatStreamRequest& request) { return request.request(); }

template <typename Request>
absl::StatusOr<OwnedInput> ParseInput(const grpc::ByteBuffer& bytes, const char* prefix) {
  auto message = std::make_unique<Request>();
  const absl::Status status = ParseMessage(bytes, message.get());
  if (!status.ok()) return status;
  GenerationInput input = InputOf(Inner(*message), prefix);
  return OwnedInput{std::move(message), std::move(input)};
}

template <typename Response, typename Collected>
grpc::ByteBuffer EncodeResponse(Collected collected) {
  Response response;
  response.set_request_id(std::move(collected.request_id));
  response.set_model(std::move(collected.model));
  response.set_seed(collected.seed);
  response.set_max_tokens(collected.max_tokens);
  *response.mutable_choices() = std::move(collected.choices);
  *response.mutable_usage() = std::move(collected.usage);
  *response.mutable_timings() = std::move(collected.timings);
  return SerializeMessage(response);
}

template <typename Response>
grpc::ByteBuffer EncodeEvent(const std::string& request_id, StreamEvent event) {
  Response response;
  response.set_request_id(request_id);
  if (auto* started = std::get_if<pb::Started>(&event)) {
    *response.mutable_started() = std::move(*started);
  } else if (auto* delta = std::get_if<pb::Delta>(&event)) {
    *response.mutable_delta() = std::move(*delta);
  } else {
    *response.mutable_finished() = std::move(std::get<pb::Finished>(event));
  }
  return SerializeMessage(response);
}

}  // namespace

absl::StatusOr<OwnedInput> GenerateCall::Parse(const grpc::ByteBuffer& bytes) const {
  return ParseInput<pb::GenerateRequest>(bytes, "");
}
grpc::ByteBuffer GenerateCall::Encode(Collected collected) const {
  return EncodeResponse<pb::GenerateResponse>(std::move(collected));
}

absl::StatusOr<OwnedInput> ChatCall::Parse(const grpc::ByteBuffer& bytes) const {
  return ParseInput<pb::ChatRequest>(bytes, "");
}
grpc::ByteBuffer ChatCall::Encode(Collected collected) const {
  return EncodeResponse<pb::ChatResponse>(std::move(collected));
}

absl::StatusOr<OwnedInput> GenerateStreamCall::Parse(const grpc::ByteBuffer& bytes) const {
  return ParseInput<pb::GenerateStreamRequest>(bytes, "request.");
}
grpc::ByteBuffer GenerateStreamCall::Encode(const std::string& request_id,
                                            StreamEvent event) const {
  return EncodeEvent<pb::GenerateStreamResponse>(request_id, std::move(event));
}

absl::StatusOr<OwnedInput> ChatStreamCall::Parse(const grpc::ByteBuffer& bytes) const {
  return ParseInput<pb::ChatStreamRequest>(bytes, "request.");
}
grpc::ByteBuffer ChatStreamCall::Encode(const std::string& request_id, StreamEvent event) const {
  return EncodeEvent<pb::ChatStreamResponse>(request_id, std::move(event));
}

}  // namespace nibble::gateway
