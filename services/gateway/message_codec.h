// Messages of the public port to and from bytes.
//
// gRPC's own C++ glue answers a request that does not parse with UNIMPLEMENTED and an empty text
// (1.51: a null request makes the callback handler fall back to its default). Here the handlers
// take bytes, so that such a request ends INVALID_ARGUMENT and names its field.
#pragma once

#include <google/protobuf/message.h>
#include <grpcpp/support/byte_buffer.h>

#include "absl/status/status.h"

namespace nibble::gateway {

// INVALID_ARGUMENT: either the bytes are no protobuf message of this type, or a string field is not
// UTF-8 (each such field is named). Unknown fields are ignored.
[[nodiscard]] absl::Status ParseMessage(const grpc::ByteBuffer& bytes,
                                        google::protobuf::Message* message);

[[nodiscard]] grpc::ByteBuffer SerializeMessage(const google::protobuf::Message& message);

}  // namespace nibble::gateway
