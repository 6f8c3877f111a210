// What bounds a request and the gateway as a whole. Set once at start.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/clock.h"

namespace nibble::gateway {

struct Limits {
  // The transport.
  int32_t receive_message_bytes = 4 << 20;
  int32_t send_message_bytes = 64 << 20;
  // Metadata of one call, each entry with 32 bytes more as HTTP/2 counts them. The call is refused
  // past the first bound; past the second gRPC closes the connection, with all its calls.
  size_t call_metadata_bytes = 8 << 10;
  int32_t metadata_bytes = 16 << 10;
  int32_t streams_per_connection = 100;

  // The process.
  int32_t max_concurrency = 1024;         // calls in flight, health and reflection apart
  size_t stream_buffer_bytes = 64 << 10;  // waiting for one slow reader; above it nothing is read
  Duration stall_timeout = std::chrono::seconds(30);
  size_t tokenize_queue = 256;             // texts waiting for the tokenizing pool
  size_t tokenize_queue_bytes = 64 << 20;  // of those together
  // Left for the way back when a deadline is passed on.
  Duration deadline_margin = std::chrono::milliseconds(10);

  // Fields.
  size_t prompt_bytes = 1 << 20;  // text, or all parts of a conversation together
  size_t model_bytes = 256;
  size_t request_id_bytes = 128;
  uint32_t n = 8;
  int stops = 16;
  size_t stop_bytes = 256;
  int stop_token_ids = 64;
  uint32_t logprobs = 20;
  int logit_bias = 300;
  int messages = 1024;
  int json_depth = 64;
  Duration queue_timeout = std::chrono::hours(1);
};

}  // namespace nibble::gateway
