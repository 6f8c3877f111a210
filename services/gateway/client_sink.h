// Where a generation's events go: the client's side of the call, unary or streaming.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "nibble/inference/v1/inference.pb.h"

namespace nibble::gateway {

struct GenerationEnd {
  absl::Status status;
  uint64_t tokens_delivered = 0;
  std::string group = {};       // empty where none took the request
  std::string cause = {};       // id of the log line that says more; empty = none
  std::string request_id = {};  // empty where the request was refused before it had one
  // Nobody waits for what is still queued (cancel, stall): it is thrown away.
  bool abandon = false;
};

// Called under the generation's lock, one at a time, in this order: OnStarted at most once, deltas
// and ends of choices, OnEnd exactly once and nothing after it. Must not call back.
class ClientSink {
 public:
  virtual ~ClientSink() = default;
  virtual void OnStarted(const std::string& request_id, inference::v1::Started started) = 0;
  // Not OK: the answer has grown past a bound; the generation ends with that status.
  [[nodiscard]] virtual absl::Status OnDelta(inference::v1::Delta delta) = 0;
  virtual void OnFinished(inference::v1::Finished finished) = 0;
  virtual void OnEnd(GenerationEnd end) = 0;
  // True when too much waits for the client: then no more is read from the worker until the sink
  // calls Generation::Resume, which it does once for every true.
  [[nodiscard]] virtual bool Full() = 0;
};

}  // namespace nibble::gateway
