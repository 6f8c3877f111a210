// base durations as the wire has them.
#pragma once

#include <google/protobuf/duration.pb.h>

#include "base/clock.h"

namespace nibble::rpc {

// REQUIRES: duration >= 0.
[[nodiscard]] inline google::protobuf::Duration ToProto(Duration duration) {
  google::protobuf::Duration message;
  message.set_seconds(duration.count() / 1'000'000'000);
  message.set_nanos(static_cast<int32_t>(duration.count() % 1'000'000'000));
  return message;
}

}  // namespace nibble::rpc
