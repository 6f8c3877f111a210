// Turns a GenerateRequest into an engine request. Nothing that the gateway sends is trusted: every
// field is held against its range before the engine sees it.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "nibble/worker/v1/worker.pb.h"
#include "worker/engine/engine.h"

namespace nibble::rpc {

// What a request may ask for. Set once at start.
struct RequestLimits {
  int32_t vocab_size = 0;
  int32_t max_context = 0;
  int32_t logit_bias_max = 300;
  int32_t stop_ids_max = 256;
  int32_t request_id_bytes_max = 128;
  Duration queue_wait_default = std::chrono::seconds(10);  // where the request names none
  Duration queue_wait_max = std::chrono::hours(1);
};

// `deadline` is the call's. INVALID_ARGUMENT with one BadRequest violation for every bad field, or
// with reason CONTEXT_LENGTH_EXCEEDED where only the length is wrong.
[[nodiscard]] absl::StatusOr<engine::Request> ToEngineRequest(
    const worker::v1::GenerateRequest& request, const RequestLimits& limits, Deadline deadline,
    const Clock& clock);

}  // namespace nibble::rpc
