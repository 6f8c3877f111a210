// The engine speaks in plain statuses; here they get the reasons of the API's contract.
#pragma once

#include "absl/status/status.h"

namespace nibble::rpc {

// Of a request that Submit() refused. REQUIRES: !status.ok().
[[nodiscard]] absl::Status WithSubmitReason(absl::Status status);

// Of a sequence that ended otherwise than well. REQUIRES: !status.ok().
[[nodiscard]] absl::Status WithFinishReason(absl::Status status);

}  // namespace nibble::rpc
